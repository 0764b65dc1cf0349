"""From images and annotations on disk to the lists of a data set."""

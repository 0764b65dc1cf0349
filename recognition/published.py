"""Published facts on the data sets of T2FTS (IEEE TGRS 2022, doi 10.1109/TGRS.2022.3177853): classes in id order,
groups, numbers of images."""

FGSC23 = {
    "name": "FGSC-23",
    "classes": [
        "non-ship", "aircraft carrier", "destroyer", "landing craft", "frigate", "amphibious transport dock", "cruiser",
        "Tarawa-class amphibious assault ship", "amphibious assault ship", "command ship", "submarine", "medical ship",
        "combat boat", "auxiliary ship", "container ship", "car carrier", "hovercraft", "bulk carrier", "oil tanker",
        "fishing boat", "passenger ship", "liquefied gas ship", "barge",
    ],
    "groups": {
        "head": [0, 2, 4, 6, 17],
        "middle": [1, 8, 10, 12, 13, 18],
        "tail": [3, 5, 7, 9, 11, 14, 15, 16, 19, 20, 21, 22],
    },
    "train": [387, 132, 434, 86, 236, 72, 234, 70, 123, 71, 190, 17, 114, 180, 81, 58, 96, 274, 132, 82, 70, 74, 43],
    # Only the totals of the test part are published: head, middle, tail.
    "test_by_group": {"head": 392, "middle": 220, "tail": 213},
}

DOTA = {
    "name": "DOTA",
    # Alphabetical, unlike the order of most detection toolboxes.
    "classes": [
        "baseball-diamond", "basketball-court", "bridge", "ground-track-field", "harbor", "helicopter", "large-vehicle",
        "plane", "roundabout", "ship", "small-vehicle", "soccer-ball-field", "storage-tank", "swimming-pool",
        "tennis-court",
    ],
    "groups": {"head": [6, 9, 10], "middle": [2, 4, 7, 12, 13, 14], "tail": [0, 1, 3, 5, 8, 11]},
    "train": [415, 515, 2047, 325, 5983, 630, 16969, 7971, 399, 28068, 26126, 326, 5029, 1736, 2367],
    "test": [214, 132, 464, 144, 2090, 73, 4387, 2531, 179, 8960, 5438, 153, 2888, 440, 760],
}

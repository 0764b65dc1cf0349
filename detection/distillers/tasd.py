"""Task-aware spatial disentangle distillation (TASD of LTD, TGRS 2023): boxes and classes are distilled in regions of
their own.

The losses are functions of the outputs of both networks, which saw the same images, and of the targets. No gradient
reaches the teacher. Where there is nothing to distil a loss is 0, and so is its gradient. N images, A anchors of all
levels."""

from typing import Any

import torch

from detection.assigners.targets import Targets
from detection.distillers.divergence import divergence, mean_kl
from detection.distillers.regions import valuable_region
from detection.geometry.anchors import Anchors
from detection.network.gfl_head import Outputs

CLS_REGIONS = ("centre", "shared")
ROW_WEIGHTS = ("certainty", "logit_sum_parity")
NORM = 16  # what the released code divides every sum by
LOGIT_SUM_TEMPERATURE = 5.0


def tasd_losses(student: Outputs, teacher: Outputs, targets: Targets, anchors: Anchors,
                settings: Any) -> dict[str, torch.Tensor]:
    """The unweighted losses of TASD on a batch, {name: scalar}. KL is divergence.mean_kl, a row r is one edge of an
    anchor, sums run over the whole batch.

        tasd_ld_main  sum_{r in M} w_r KL(edges_r) / 16      M: the main region, the positive anchors
        tasd_ld_vlr   sum_{r in V} w_r KL(edges_r) / 16      V: regions.valuable_region
        tasd_kd_main  sum_{a in M} KL(logits_a) / 16
        tasd_kd_vlr   sum_{a in U} KL(logits_a) / 16         U: of V, the anchors with their centre inside the object

    w_r are `row_weights`. The released code lacks the function that tells the regions of boxes and of classes apart: U
    is our reading, that a class shows in the interior and a box at the border (as in TSD: Song et al., CVPR 2020).
    settings.tasd_cls_region `shared` takes V in place of U, as the released code does.

    student, teacher: Outputs. targets: Targets. anchors: Anchors. settings: LTDSettings, of which gamma and vlr_metric
    are those of regions.valuable_region. The sums are those of each process: they grow with its images."""
    def region(interior: bool) -> torch.Tensor:
        return valuable_region(anchors.boxes, targets.gt_boxes, targets.image_of, targets.thresholds, targets.valid,
                               settings.gamma, settings.vlr_metric, interior) > 0  # (N, A)

    with torch.no_grad():
        main, of_boxes = targets.positive, region(interior=False)
        of_classes = region(interior=True) if settings.tasd_cls_region == "centre" else of_boxes
    losses = {}
    for name, chosen in (("main", main), ("vlr", of_boxes)):
        rows = chosen.nonzero(as_tuple=True)
        edges, wanted = student.edges[rows], teacher.edges[rows].detach()  # (P, 4, R + 1)
        weights = row_weights(wanted, anchors.levels[rows[1]], len(anchors.sizes), settings.tasd_row_weights)  # (P, 4)
        losses[f"tasd_ld_{name}"] = (weights * mean_kl(edges, wanted, settings.ld_temperature)).sum() / NORM
    logits = student.logits[:, :, None], teacher.logits[:, :, None]  # K = 1
    for name, chosen in (("main", main), ("vlr", of_classes)):
        losses[f"tasd_kd_{name}"] = divergence(*logits, chosen, settings.kd_temperature) / NORM
    return losses


def row_weights(teacher: torch.Tensor, levels: torch.Tensor, count: int, kind: str = "certainty") -> torch.Tensor:
    """The weights of the rows of a region, (P, 4): n * softmax(s_r) over the n rows of each level, 1 on average.

    teacher: (P, 4, R + 1) logits. levels: (P,) int64 in 0..count - 1. kind: `certainty`, where s_r is minus the entropy
    of the teacher's distribution, so that a row weighs by how sure the teacher is; or `logit_sum_parity`, the sum of
    the logits / 5, as in the released code, which a constant added to all of a row's logits changes, though it does not
    change the distribution. Raises ValueError for another kind."""
    if kind not in ROW_WEIGHTS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(ROW_WEIGHTS)}")
    if kind == "certainty":
        log_p = teacher.log_softmax(dim=-1)
        scores = (log_p.exp() * log_p).sum(dim=-1)
    else:
        scores = teacher.sum(dim=-1) / LOGIT_SUM_TEMPERATURE
    scores, level = scores.flatten(), levels.repeat_interleave(teacher.shape[1])  # (P * 4,)
    largest = scores.new_zeros(count).scatter_reduce_(0, level, scores, "amax", include_self=False)
    shares = (scores - largest[level]).exp()
    means = scores.new_zeros(count).scatter_reduce_(0, level, shares, "mean", include_self=False)
    return (shares / means[level]).view(teacher.shape[:2])

"""Losses over sparse labels: one number an image, no dense target.

Labels come in CSR form: image i of the batch has `label_ids[label_offsets[i]:label_offsets[i +
1]]`, none, one or many. Nothing here waits for the device.

    logits: (N, C), floating point; losses are computed in float32, or float64 if the logits are
    label_ids: (nnz,), int64 in [0, C), no id twice in one image
    label_offsets: (N + 1,), int64
    returned losses: (N,), float32 or float64
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_cross_entropy(
    logits: Tensor, label_ids: Tensor, label_offsets: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy against the labels' uniform distribution; an image without labels has loss 0.

    `label_smoothing` moves that share of the target to the uniform distribution over all classes.
    """
    log_shares = F.log_softmax(_exact(logits), dim=1)
    num_labels = label_offsets.diff()
    at_labels = _sum_at_labels(log_shares, label_ids, label_offsets) / num_labels.clamp(min=1)
    if label_smoothing == 0.0:
        return -at_labels
    everywhere = log_shares.mean(dim=1) * (num_labels > 0)
    return -(1 - label_smoothing) * at_labels - label_smoothing * everywhere


def sigmoid_cross_entropy(logits: Tensor, label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    """Binary cross-entropy of every class, summed over the classes.

    A class costs softplus(z) where it is absent, softplus(-z) = softplus(z) - z where present.
    """
    logits = _exact(logits)
    return F.softplus(logits).sum(dim=1) - _sum_at_labels(logits, label_ids, label_offsets)


def label_rows(label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    """The image of every label: (nnz,), int64."""
    num_images = label_offsets.numel() - 1
    return torch.repeat_interleave(
        torch.arange(num_images, device=label_offsets.device),
        label_offsets.diff(),
        output_size=label_ids.numel(),  # spares a wait for the device
    )


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum_at_labels(values: Tensor, label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    rows = label_rows(label_ids, label_offsets)
    return values.new_zeros(len(values)).index_add(0, rows, values[rows, label_ids])

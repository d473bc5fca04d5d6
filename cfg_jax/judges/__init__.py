"""Judges: networks whose features and logits the metrics are computed from. One file each.

A judge is `judge(images uint8 [N, H, W, C]) -> (features [N, D], logits [N, num_classes])`, numpy float32. It must
share nothing with what guides: a classifier that guides would praise images that are adversarial to it (CFG paper,
section 1).
"""

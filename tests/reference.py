"""The formulas of the specification in float64 with plain loops, to compare the project with."""

import math


def loop_dice(x, target, ignore_index=-100):
    """Mean Dice over images, pixel by pixel. x, target: nested lists [image][pixel]."""
    values = []
    for pixels, truths in zip(x, target, strict=True):
        product = total = 0.0
        for pixel, truth in zip(pixels, truths, strict=True):
            if ignore_index < 0 or truth != ignore_index:
                product += pixel * truth
                total += pixel + truth
        values.append(1.0 if total == 0 else (2 * product + 1e-6) / (total + 1e-6))
    return sum(values) / len(values)


def loop_criterion(logits, target, weight, ignore_index, dice=True):
    """Cross-entropy plus Dice loss over all classes. logits [N, C, H, W], target [N, H, W]."""
    classes = logits.shape[1]
    logits, target = logits.double().flatten(2).tolist(), target.flatten(1).tolist()  # [N][C][pixel], [N][pixel]
    numerator = denominator = 0.0
    probabilities = [[[] for _ in range(classes)] for _ in logits]
    one_hot = [[[] for _ in range(classes)] for _ in logits]
    for n, labels in enumerate(target):
        for pixel, label in enumerate(labels):
            exponentials = [math.exp(logits[n][c][pixel]) for c in range(classes)]
            for c in range(classes):
                probabilities[n][c].append(exponentials[c] / sum(exponentials))
                one_hot[n][c].append(ignore_index if label == ignore_index else float(label == c))
            if label != ignore_index:
                numerator -= weight[label] * math.log(exponentials[label] / sum(exponentials))
                denominator += weight[label]
    loss = numerator / denominator if denominator else 0.0
    if dice:
        per_class = [
            loop_dice([image[c] for image in probabilities], [image[c] for image in one_hot], ignore_index)
            for c in range(classes)
        ]
        loss += 1 - sum(per_class) / classes
    return loss

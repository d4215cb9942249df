"""Segment the vessels of a retinal photograph with trained weights."""

import argparse
import time

import numpy as np
import torch
from PIL import Image

from my_dataset import read_binary_mask, read_photograph
from train_utils.checkpoint import load_model
from train_utils.command_line import Parser, UsageError, run_script, select_device
from train_utils.files import replace_whole
from transforms import get_transform


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    print(f"using {device} device.")
    model, checkpoint = load_model(args.weights, device)
    photograph = read_photograph(args.image)
    field_of_view = read_binary_mask(args.roi_mask)
    if field_of_view.shape != photograph.shape[:2]:
        raise UsageError(
            f"--roi-mask {args.roi_mask}: is {field_of_view.shape[1]} x {field_of_view.shape[0]} pixels, but the "
            f"photograph is {photograph.shape[1]} x {photograph.shape[0]}; they must match"
        )
    transform = get_transform(False, checkpoint["mean"], checkpoint["std"])
    image, _ = transform(Image.fromarray(photograph), Image.fromarray(field_of_view))  # [3, H, W]

    started = time.perf_counter()
    with torch.inference_mode():
        logits = model(image.unsqueeze(0).to(device))["out"]  # [1, C, H, W]
    classes = logits.argmax(1).squeeze(0).cpu().numpy()  # [H, W]
    print(f"inference time: {time.perf_counter() - started:.3f} s")

    vessels = (classes == 1) & field_of_view
    share = vessels.sum() / max(field_of_view.sum(), 1)
    with replace_whole(args.output) as file:
        Image.fromarray(np.where(vessels, 255, 0).astype(np.uint8)).save(file, format="PNG")
    print(f"{args.output}: vessels are {share:.1%} of the field of view")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", default="./save_weights/best_model.pth", help="weights that train.py or the tutorial wrote")
    add("--image", default="./DRIVE/test/images/01_test.tif", help="the photograph")
    add("--roi-mask", default="./DRIVE/test/mask/01_test_mask.gif", help="its field of view: white inside")
    add("--output", default="test_result.png", help="the PNG to write: 255 = vessel")
    add("--device", default="cuda", help="cuda means the CPU where there is no GPU")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser().parse_args())

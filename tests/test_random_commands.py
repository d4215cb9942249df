"""Random commands of predict.py in one folder, where other programs write between them.

Without --overwrite, what these wrote stays; and a mask that a command leaves there is of its photograph and its flags.
"""

import random

import numpy as np
import pytest
from PIL import Image

import predict
from tests.test_predict import make_model, pixels, save
from train_utils.command_line import run_script
from train_utils.synthetic_drive import synthetic_photograph

STEPS = 14
NAMES = ("a", "b", "c")  # of the photographs; there is one content more
THRESHOLDS = ("0.5", "0.4")
KINDS = {"overlay": "--overlay", "probability": "--save-prob"}


def succeeds(*flags):
    """Run a command; return whether it ended without an error. Bugs raise."""
    try:
        run_script(predict.main, predict.parse_args(["--device", "cpu", *map(str, flags)]))
    except SystemExit as end:
        return not end.code
    return True


class Folder:
    """A folder of photographs and one of masks, with what other programs wrote there, and who did what."""

    def __init__(self, root, weights, contents, expected, seed):
        self.random = random.Random(seed)
        self.photographs, self.masks = root / "photographs", root / "masks"
        self.weights, self.contents, self.expected = weights, contents, expected
        self.numbers = {}  # of the content of each photograph
        self.others = {}  # what others wrote: the bytes of each file
        self.history = []
        for folder in (self.photographs, self.masks):
            folder.mkdir(parents=True)
        for number, name in enumerate(NAMES):
            self.put_photograph(name, number)

    def put_photograph(self, name, number):
        (self.photographs / f"{name}.png").write_bytes(self.contents[number])
        self.numbers[name] = number

    def others_write(self):
        """A picture is corrected by hand, or one is drawn under a name that this program would use."""
        names = [f"{name}_{kind}.png" for name in (*NAMES, "x") for kind in ("vessels", *KINDS)]
        there = list(self.masks.glob("*.png"))
        if there and self.random.random() < 0.5:
            path = self.random.choice(there)
            picture = Image.fromarray(pixels(path))
            picture.putpixel((3, 3), (1, 2, 3) if picture.mode == "RGB" else 1)
        else:
            path = self.masks / self.random.choice(names)
            picture = Image.new(self.random.choice(["L", "RGB"]), (80, 72), self.random.choice([0, 255]))
        picture.save(path)
        self.others[path] = path.read_bytes()
        self.history.append(f"others write {path.name}")

    def lose_a_file(self):
        there = [path for path in self.masks.iterdir() if path.is_file() and not path.stem.endswith("_vessels")]
        if there:
            path = self.random.choice(there)
            path.unlink()
            self.others.pop(path, None)
            self.history.append(f"{path.name} is lost")

    def predict(self):
        threshold = self.random.choice(THRESHOLDS)
        flags = [flag for flag in (*KINDS.values(), "--report", "--overwrite") if self.random.random() < 0.3]
        names = self.random.choice([NAMES, (self.random.choice(NAMES),)])
        image = self.photographs if len(names) > 1 else self.photographs / f"{names[0]}.png"
        output = self.masks
        if len(names) == 1 and self.random.random() < 0.4:
            output = self.masks / self.random.choice(["x.png", "y.png", "a_vessels.png", "b_vessels.png"])
        command = "--image", image, "--output", output, "--threshold", threshold, *flags
        done = succeeds("--weights", self.weights, *command)
        self.history.append(f"{'' if done else 'refused: '}{' '.join(map(str, command))}")
        changed = [path for path, content in self.others.items() if not path.exists() or path.read_bytes() != content]
        assert "--overwrite" in flags or not changed, "\n".join([f"lost: {changed}", *self.history])
        for path in changed:
            del self.others[path]
        if done and output == self.masks:
            for name in names:
                self.check(name, threshold, flags)

    def check(self, name, threshold, flags):
        for kind in ("vessels", *KINDS):
            path = self.masks / f"{name}_{kind}.png"
            asked = kind == "vessels" or KINDS[kind] in flags
            assert path.exists() or not asked, "\n".join([f"not there: {path.name}", *self.history])
            if path.exists() and path not in self.others:
                expected = self.expected[self.numbers[name], threshold, kind]
                assert np.array_equal(pixels(path), expected), "\n".join([f"another's: {path.name}", *self.history])

    def act(self):
        action = self.random.choice([self.predict] * 4 + [self.others_write, self.others_write, self.lose_a_file, None])
        if action is not None:
            action()
        else:
            self.put_photograph(self.random.choice(NAMES), self.random.randrange(len(self.contents)))


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 100), marks=pytest.mark.slow)])
def test_what_others_wrote_stays(tmp_path, capsys, seeds):
    weights = save(tmp_path / "weights.pth", make_model())
    contents, expected = [], {}
    for number in range(len(NAMES) + 1):
        path = tmp_path / f"{number}.png"
        Image.fromarray(synthetic_photograph(80, 72, np.random.default_rng(number))[0]).save(path)
        contents.append(path.read_bytes())
        for threshold in THRESHOLDS:
            folder = tmp_path / f"{number}_{threshold}"
            flags = "--image", path, "--output", folder, "--threshold", threshold, *KINDS.values()
            assert succeeds("--weights", weights, *flags)
            for kind in ("vessels", *KINDS):
                expected[number, threshold, kind] = pixels(folder / f"{number}_{kind}.png")
    for seed in seeds:
        folder = Folder(tmp_path / f"seed{seed}", weights, contents, expected, seed)
        for _ in range(STEPS):
            folder.act()
        capsys.readouterr()

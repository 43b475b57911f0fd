"""Draw every picture of a run again, from its folder alone.   python -m experiments.plot runs/NAME
[--pdf]"""

import sys
from pathlib import Path

import experiments
import t1


def draw_run(folder: Path, suffix: str = ".png") -> list[Path]:
    """curves.png of each stage and the pictures of eval -> their paths. Misuse if the folder holds
    no run."""
    for stage in t1.PANELS:
        if (folder / stage / "metrics.jsonl").exists():
            t1.draw_steps(folder / stage, suffix)
    if (folder / "eval" / "results.json").exists():
        t1.draw_results(folder / "eval", suffix)
    pictures = sorted(folder.glob(f"*/*{suffix}"))
    if not pictures:
        raise t1.Misuse(f"{folder}: no run there; give the folder of one, runs/NAME")
    return pictures


def work(own, options: list[str]):
    for folder in own.folder:
        print(*draw_run(folder, ".pdf" if own.pdf else ".png"), sep="\n")


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("plot", __doc__, t1_options=False)
    parser.add_argument("folder", nargs="+", type=Path, help="runs/NAME, one or more")
    parser.add_argument("--pdf", action="store_true", help="PDF in place of PNG, for papers")
    return experiments.run(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Draw every picture of a run again, from its folder alone.   python -m experiments.plot runs/NAME [--pdf]"""

import argparse
import sys
from pathlib import Path

import t1

def draw_run(folder: Path, suffix: str = ".png") -> list[Path]:
    """curves.png of each stage and the pictures of eval -> their paths. Misuse if the folder holds no run."""
    for stage in t1.PANELS:
        if (folder / stage / "metrics.jsonl").exists():
            t1.draw_steps(folder / stage, suffix)
    if (folder / "eval" / "results.json").exists():
        t1.draw_results(folder / "eval", suffix)
    pictures = sorted(folder.glob(f"*/*{suffix}"))
    if not pictures:
        raise t1.Misuse(f"{folder}: no run there; give the folder of one, runs/NAME")
    return pictures

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.plot", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="runs/NAME, one or more")
    parser.add_argument("--pdf", action="store_true", help="PDF in place of PNG, for papers")
    args = parser.parse_args(argv)
    try:
        for folder in args.folder:
            print(*draw_run(folder, ".pdf" if args.pdf else ".png"), sep="\n")
    except t1.Stop as e:
        return t1.complain(str(e), e.code)
    return 0

if __name__ == "__main__":
    sys.exit(main())

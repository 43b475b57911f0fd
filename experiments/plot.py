"""Draw every picture of a run again, from its folder alone.   python -m experiments.plot runs/NAME"""

import argparse
import sys
from pathlib import Path

import t1

def draw_run(folder: Path) -> list[Path]:
    """curves.png of each stage and the pictures of eval -> their paths. Misuse if the folder holds no run."""
    for stage in t1.PANELS:
        if (folder / stage / "metrics.jsonl").exists():
            t1.draw_steps(folder / stage)
    if (folder / "eval" / "results.json").exists():
        t1.draw_results(folder / "eval")
    pictures = sorted(folder.glob("*/*.png"))
    if not pictures:
        raise t1.Misuse(f"{folder}: no run there; give the folder of one, runs/NAME")
    return pictures

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.plot", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="runs/NAME, one or more")
    try:
        for folder in parser.parse_args(argv).folder:
            print(*draw_run(folder), sep="\n")
    except t1.Stop as e:
        return t1.complain(str(e), e.code)
    return 0

if __name__ == "__main__":
    sys.exit(main())

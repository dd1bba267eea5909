"""Room card: `python -m unmask`, the door that the command `unmask` opens too; torchrun starts its ranks through it."""

from __future__ import annotations

from unmask.cli import main

if __name__ == "__main__":
    main()

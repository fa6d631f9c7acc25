"""`python -m gridmill` is the same as `gridmill`."""

from gridmill.cli import main

raise SystemExit(main())

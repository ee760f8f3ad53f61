"""``python -m zograph``: the command line."""

from zograph.cli import main

raise SystemExit(main())

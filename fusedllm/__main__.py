"""`python -m fusedllm`."""

import sys

from fusedllm.cli.main import main

sys.exit(main())

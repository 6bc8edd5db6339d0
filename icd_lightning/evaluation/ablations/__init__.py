"""Table 2 (arXiv:2406.14539): what more segments, the preservation losses and dynamic guidance each add."""

"""The preference study: blinded comparisons of edits, votes of many assessors, a report (Fig. 13, arXiv:2406.14539)."""

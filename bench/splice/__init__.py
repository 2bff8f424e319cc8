"""`e2sci bench splice`: what noticing an abrupt change of text saves (docs/credit.md)."""

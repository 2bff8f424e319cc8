"""The shell around decoding.edge and a draft model."""

"""The shell around decoding.cloud and a target model."""

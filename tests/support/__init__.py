"""What tests share: small data, models, runs and commands."""

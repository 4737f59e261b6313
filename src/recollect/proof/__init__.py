"""What the commands compute that prove and measure reuse."""

"""What the tests share: the backends they run on, comparisons that explain a failure, seeds, covering arrays."""

"""One script per question; each prints its command, the hardware and the numbers, and writes them as JSON."""

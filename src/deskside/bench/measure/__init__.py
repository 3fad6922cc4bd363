"""What is measured and how: targets, prompts, the loop, what stands beside a figure."""

"""The demo: a real language model fine-tuned on packed real tasks, and loss curves of a small one. `make demo`."""

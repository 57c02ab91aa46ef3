"""What the examples share: stages that resume, ranks started without torchrun, answers before and after training."""

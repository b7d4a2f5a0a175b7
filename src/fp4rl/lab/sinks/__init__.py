"""Where numbers go besides the run folder, for eyes that follow a run: TensorBoard, Weights & Biases, MLflow."""

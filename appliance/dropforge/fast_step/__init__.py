"""The training step with the host off the critical path.

flat        parameters and gradients in flat buffers
optimizer   AdamW over them: norm, clip and update without waiting for the GPU
step        forward and backward of a micro-batch, captured as a CUDA graph per bucket shape, else eager
report      which buckets were captured, and why any was not
loader      optimizer steps as a DataLoader that transformers' Trainer takes
trainer     the mixin that puts all of it into transformers' Trainer and TRL's SFTTrainer
"""

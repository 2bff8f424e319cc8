"""`e2sci distill`: make a draft from a target and train it on the target's own answers.

| module | what |
|---|---|
| `prompts` | what is asked: given prompts, or the target's own |
| `answers` | the target answers them; what it thought is kept |
| `records` | that, on disk: the cache the training reads |
| `vocabulary` | which tokens the draft's head gets |
| `student` | the draft while it learns; depth pruning; writing it out |
| `training` | loss, batches, learning rate, checkpoints |
| `evaluation` | how often the draft is right, and how far it is off |
| `run` | all of it within a time budget, resumable |
"""

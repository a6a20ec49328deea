"""What a response is worth: one file a reward, a dataclass with `name`, `weight` and `start(context)`.

`start` returns a function `Rollouts -> [B] f32`. Text rewards call `base.text_scorer`, which hands them
(prompts, responses, meta) and takes a list of floats. Rewards of a run are summed with their weights.
A reward that raises stops the run: no failure is turned into a score.
"""

"""How weights are adapted: one file an option, a dataclass with a `name` and these methods.

- `check(stage)`: refuse a stage's config that it does not go with
- `check_start(start, scores)`: refuse a `ModelSource` that it cannot continue, from JSON alone
- `peft_config(task_type, hf)`: what TRL's trainers are given (None: all weights train)
- `roles(...)`: the module of policy, ref_policy, critic and reward_model, with heads (`models.loading.make_roles`)
- `parameters(roles, role)`: what the engine of that role trains
- `nf4`: whether the base is held in 4 bits (`models.loading.load_base`)
- `adapter_rank`: of the adapter that a sync may send; None: whole weights
- `payload(roles)`: what a weight sync may send: the policy's weights as its base checkpoint names them, an adapter's files
- `critic_kinds`: the values of critic.kind it can make, the default first
- `save(roles, folder)`: the policy for the next stage

What may be imported here stands in the contract of pyproject.toml: `models` and the rooms below it.
"""

"""What scores a completion: functions of the user's own, built-in ones, a reward model, a judge.

A reward is a function and one entry of `config.rewards.REWARDS`. Each runs in a process of its own
(`pool`, `process`), so that code that hangs or dies costs one score and not the run. That keeps
mistakes apart; it is no sandbox, and the code may do what the user may.
"""

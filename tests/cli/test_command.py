"""The command as results and plans tell it."""

from __future__ import annotations

import shlex

from vidaccel.cli.command import command_line


def test_it_can_be_run_again() -> None:
    words = ["/some/where/vidaccel", "calibrate", "--prompt", "a red ball", "--density=0.5"]
    assert command_line(words) == "vidaccel calibrate --prompt 'a red ball' --density=0.5"


def test_prompts_are_left_out_of_what_goes_from_hand_to_hand() -> None:
    words = ["vidaccel", "calibrate", "--prompt", "a secret", "--prompt=a secret", "--negative_prompt", "a secret"]
    words += ["--negative-prompt=a secret", "--arg", "prompt_2=a secret", "--arg=prompt_2=a secret", "--arg", "n=1"]
    words += ["--arg", "prompt", "--prompts", "file.txt", "-o", "plan.safetensors"]
    told = command_line(words, prompts=False)
    assert "secret" not in told
    found = shlex.split(told)
    hidden = found[3]
    assert hidden.startswith("sha256:") and found[:4] == ["vidaccel", "calibrate", "--prompt", hidden]
    assert found.count(hidden) == 2 and found.count(f"prompt_2={hidden}") == 1
    assert f"--arg=prompt_2={hidden}" in found and "n=1" in found
    assert found[-4:] == ["--prompts", "file.txt", "-o", "plan.safetensors"]

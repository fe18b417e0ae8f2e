"""Commands that a person types, in processes of their own, against a live swarm."""

from petals.inference.sampling_params import SamplingParams
from support.processes import ProcessSwarm, run_command
from support.reference import ReferenceModel

TURN = SamplingParams(max_new_tokens=12, repetition_penalty=1.3)


def test_a_chat_goes_on_from_everything_said_before(
    demo: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    tmp_swarm.serve("demo", "0:4", "4:8")
    turns = ("And God said", " unto the people", " of the land")
    history: list[int] = []
    answers = []
    for turn in turns:
        history += demo.tokenizer(turn + "\n")["input_ids"]
        answer = demo.generate_from(history, TURN)
        answers.append(demo.tokenizer.decode(answer, skip_special_tokens=True))
        history += answer
    done = run_command(
        *("chat", "--bootstrap", tmp_swarm.address, "--max-new-tokens", "12"),
        *("--repetition-penalty", "1.3", "--dtype", "float32"),
        text="".join(f"{turn}\n" for turn in turns),
    )
    assert done.returncode == 0, done.stderr
    lines = [answer if answer.endswith("\n") else answer + "\n" for answer in answers]
    assert done.stdout == "".join(lines)

"""Programs that start from one process: their words, output and status."""

from eval.grid_fork import ForkedProgram


def test_a_forked_program_has_its_own_words_output_and_status(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "print('said', sys.argv[1:], __name__)\n"
        "print('complained', file=sys.stderr)\n"
        "sys.exit(3 if sys.argv[1:] == ['badly'] else 0)\n"
    )
    for word, status in (("well", 0), ("badly", 3)):
        log = tmp_path / f"{word}.log"
        with log.open("w") as file:
            assert ForkedProgram(str(script), [word], log=file, preload=()).wait() == status
        assert log.read_text().splitlines() == [f"said ['{word}'] __main__", "complained"]


def test_a_forked_program_can_be_ended(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with (tmp_path / "log").open("w") as file:
        program = ForkedProgram(str(script), [], log=file, preload=())
        program.terminate()
        assert program.wait() < 0

"""`python -m cupynorm compile` compiles the CPU's loops for the usual kinds of calls, and says where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import use_compiled
from helpers.loops import forget_modules, llvm_machine

import cupynorm as cn
from cupynorm import config, cpu, warm
from cupynorm.__main__ import main


@pytest.mark.compiled
@pytest.mark.long
def test_usual_calls_compile_nothing_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_compiled(monkeypatch, True)
    forget_modules(monkeypatch)
    assert main(["compile", "--activation", "none,relu"]) == 0
    out, err = capsys.readouterr()
    number = int(err.split(" of ")[0].split()[-1])
    assert str(folder) in out and len(err.splitlines()) == 1
    assert len([*folder.iterdir()]) == number > 40
    forget_modules(monkeypatch)  # as in another process, which finds them on disk
    made: list[Any] = []
    emit = llvm_machine.emit
    monkeypatch.setattr(llvm_machine, "emit", lambda write: made.append(write) or emit(write))
    for shape, order in (*warm.USUAL, ((2, 5, 90, 80), (0, 1, 2, 3)), ((2, 70, 60, 3), (0, 3, 1, 2))):
        x = np.ones(shape, np.float32).transpose(order)
        for activation in (None, "relu"):
            y, saved = cn.instance_norm_forward(x, activation=activation)
            cn.instance_norm_backward(y, saved)
    assert not made
    cn.instance_norm(x, activation="gelu")
    assert made


def test_what_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says why, and nothing is compiled."""
    monkeypatch.setattr(warm, "usual_steps", lambda *_: pytest.fail("compiled something"))
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "llvmlite", None)
        patch.setattr(cpu, "without_llvmlite", "it is not here")
        with pytest.raises(SystemExit) as ended:
            main(["compile"])
    assert ended.value.code == 2 and "it is not here" in capsys.readouterr().err
    for wrong, message in (
        ("--dtype=int8", "'int8' is not one of float16"),
        ("--activation=tanh", "'tanh' is not one"),
    ):
        with pytest.raises(SystemExit):
            main(["compile", wrong])
        assert message in capsys.readouterr().err
    if cpu.llvmlite is not None:
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(config.cache_folder, "given", str(tmp_path / "file" / "folder"))
        with pytest.raises(SystemExit):
            main(["compile"])
        assert "CUPYNORM_CACHE_DIR" in capsys.readouterr().err

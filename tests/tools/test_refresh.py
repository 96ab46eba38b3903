# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Porting patches to a release: merged, placed, followed, or said to be impossible."""

import pytest

from tools import patches, refresh, series

from .conftest import ENGINE, ENGINE_PATCH_NAME, PATCH, REGISTRY, REGISTRY_PATCH_NAME

NEW = "1.3.0"
OVERRIDE_NAME = f"patches/generic-models/{NEW}/0001-registry.diff"
# The patch with one line of context on either side of its change.
HOOK = PATCH.replace("@@ -1,3 +1,4 @@", "@@ -2,3 +2,4 @@")
BEFORE = {"vllm/registry.py": f"# first\n{REGISTRY}", "vllm/v1/engine.py": ENGINE}


@pytest.fixture
def ported(repository, capsys, monkeypatch):
    """Ports to a release with changes; gives what it printed and the file patched."""
    repository.write(REGISTRY_PATCH_NAME, HOOK)
    contents = {"1.2.3": BEFORE}

    def read(release):
        for name, text in contents[release.upstream].items():
            yield name, text.encode()

    monkeypatch.setattr(refresh, "read_sdist", read)

    def port(registry: str | None, path: str = "vllm/registry.py"):
        contents[NEW] = {"vllm/v1/engine.py": ENGINE}
        if registry is not None:
            contents[NEW][path] = registry
        status = refresh.main(NEW)
        originals = {n: text.encode() for n, text in contents[NEW].items()}
        if status:
            return status, capsys.readouterr().out, ""
        results = patches.run_series(series.series(NEW), originals)
        return status, capsys.readouterr().out, results[path].decode()

    return port


def test_what_fits_is_left_alone(ported, repository):
    before = (repository.root / REGISTRY_PATCH_NAME).read_text()
    status, out, result = ported("# more\n# lines\n" + REGISTRY)
    assert status == 0
    assert "every patch fits vLLM 1.3.0" in out
    assert "wrap(model)" in result
    assert (repository.root / REGISTRY_PATCH_NAME).read_text() == before
    assert not (repository.root / OVERRIDE_NAME).exists()


def test_a_change_nearby_is_merged_into_an_override(ported, repository):
    changed = "# first\n" + REGISTRY.replace("return name", "return models[name]")
    status, out, result = ported(changed)
    assert status == 0
    assert f"ok    {OVERRIDE_NAME}: vllm/registry.py" in out
    assert result == changed.replace(
        "    models[name] = model\n",
        "    from .callables import wrap\n    models[name] = wrap(model)\n",
    )


def test_another_indentation_is_followed_and_has_to_be_read(ported):
    changed = "# first\nif True:\n" + "".join(
        f"    {line}\n" for line in REGISTRY.splitlines()
    )
    status, out, result = ported(changed)
    assert status == 0
    assert "placed by less context: read it" in out
    assert "\n        models[name] = wrap(model)\n" in result


def test_a_file_that_moved_is_followed(ported, repository):
    status, out, result = ported(f"# first\n{REGISTRY}", "vllm/models/registry.py")
    assert status == 0
    assert "vllm/models/registry.py, followed to where the code is" in out
    assert "wrap(model)" in result
    override = (repository.root / OVERRIDE_NAME).read_text()
    assert override.startswith("Without: vllm/registry.py\ndiff --git")


@pytest.mark.parametrize(
    ("registry", "complaint"),
    [
        ("# first\ndef add(name, model):\n    pass\n", "is gone. Port it."),
        (None, "has no vllm/registry.py, and it fits no other. Port it."),
        (
            "# first\n"
            + REGISTRY.replace("name] = model", "name] = wrap(model)").replace(
                "    models", "    from .callables import wrap\n    models"
            ),
            "has the change already: see its Drop-when.",
        ),
    ],
)
def test_what_cannot_be_ported_is_said(ported, repository, registry, complaint):
    before = (repository.root / REGISTRY_PATCH_NAME).read_text()
    status, out, _ = ported(registry)
    assert status == 1
    assert f"FAIL  {REGISTRY_PATCH_NAME}: " in out
    assert complaint in out
    assert (repository.root / REGISTRY_PATCH_NAME).read_text() == before
    assert not (repository.root / OVERRIDE_NAME).exists()


def test_the_default_release_gives_the_line_numbers(ported, repository, capsys):
    wrong = HOOK.replace("@@ -2,3 +2,4 @@", "@@ -40,3 +40,4 @@")
    repository.write(REGISTRY_PATCH_NAME, wrong)
    ported(f"# first\n{REGISTRY}")
    assert (repository.root / REGISTRY_PATCH_NAME).read_text() == wrong
    assert refresh.main("1.2.3") == 0
    assert "renumbered" in capsys.readouterr().out
    assert (repository.root / REGISTRY_PATCH_NAME).read_text() == HOOK
    assert "@@ -1,2 +1,2 @@" in (repository.root / ENGINE_PATCH_NAME).read_text()

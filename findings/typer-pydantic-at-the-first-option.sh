#!/usr/bin/env bash
# typer 0.29 imports pydantic whenever a command line is parsed, even of a command without parameters.
#
# Versions:  typer 0.29.2 and 0.24.1, 2026-11-30
# Guess:     `import typer` is light and stays all that a small command pays; pydantic, new among its dependencies, is
#            for those who annotate parameters with pydantic's own types.
# Behaviour: `import typer` imports no pydantic indeed, so measuring the import says nothing. Running any command does:
#            every parameter, --help's own included, gets its conversion from a pydantic TypeAdapter. A command
#            without parameters pays as well, and a parser= of one's own does not avoid it. 0.24 imports none of it.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > app.py <<'PY'
import sys
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def nothing() -> None: ...


@app.command()
def text(name: str) -> None: ...


@app.command()
def parsed(name: Annotated[object, typer.Argument(parser=str)]) -> None: ...


def is_there() -> str:
    return "pydantic is imported" if "pydantic" in sys.modules else "no pydantic"


print("import typer:", is_there())
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print(*sys.argv[1:], "->", is_there())
PY
for version in 0.29.2 0.24.1; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet "typer==$version"
  echo "typer $version"
  "env-$version/bin/python" app.py nothing
  "env-$version/bin/python" app.py text x
  "env-$version/bin/python" app.py parsed x
done 2>/dev/null | tee seen
diff seen - <<'EXPECTED'
typer 0.29.2
import typer: no pydantic
nothing -> pydantic is imported
import typer: no pydantic
text x -> pydantic is imported
import typer: no pydantic
parsed x -> pydantic is imported
typer 0.24.1
import typer: no pydantic
nothing -> no pydantic
import typer: no pydantic
text x -> no pydantic
import typer: no pydantic
parsed x -> no pydantic
EXPECTED
echo "as described"

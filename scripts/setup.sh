# Sourced by the scripts beside it: goes to the repository's root; install_batchrun makes .venv with the package in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# install_batchrun [EXTRAS]: does nothing where .venv was made for this pyproject.toml and constraints.txt already.
install_batchrun() {
  local wanted stamp=".venv/installed${1-}"
  wanted=$(cat pyproject.toml constraints.txt)
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  echo "Installing batchrun${1-} into .venv ..." >&2
  [[ -x .venv/bin/pip ]] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1-}"
  echo "$wanted" > .venv/installed  # what an extra needs comes on top of the rest
  echo "$wanted" > "$stamp"
}

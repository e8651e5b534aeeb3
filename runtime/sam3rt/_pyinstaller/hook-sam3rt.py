"""PyInstaller's hook: modules are imported by name, and the bundled model is data."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

# Those of backends whose libraries the application does not contain are left out.
hiddenimports = collect_submodules("sam3rt", on_error="ignore")
datas = collect_data_files("sam3rt.default_bundle") + copy_metadata("sam3rt")

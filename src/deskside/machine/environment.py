"""The system around an engine: GPUs, memory modules, distribution, container, deskside's commit.

None stands for what the system does not tell this user.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from msgspec import Struct

from deskside.machine.told import contents, lines, said

PCI = Path("/sys/bus/pci/devices")
DISPLAY = "0x03"  # PCI's class of display controllers
NVIDIA = "0x10de"
VENDORS = {NVIDIA: "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# systemd's udev reads the DMI table as root and leaves what it says of memory for everyone.
DMI = Path("/run/udev/data/+dmi:id")
CHANNEL = re.compile(r"channel\s*[a-z0-9]+", re.IGNORECASE)


class Gpu(Struct, forbid_unknown_fields=True):
    """A display controller. `memory` in bytes."""

    name: str
    driver: str | None = None
    memory: int | None = None


class Modules(Struct, forbid_unknown_fields=True):
    """The memory modules together. `speed` is in megatransfers per second."""

    count: int
    nbytes: int
    type: str | None = None
    speed: int | None = None
    channels: int | None = None


def gpus() -> list[Gpu] | None:
    """NVIDIA's as their driver names them, others by the ids of the PCI bus."""
    found = _nvidia()
    if not PCI.is_dir():
        return found or None
    named = {NVIDIA} if found else set()
    for device in sorted(PCI.iterdir()):
        vendor, model = (contents(device / name) or "" for name in ("vendor", "device"))
        if (contents(device / "class") or "").startswith(DISPLAY) and vendor not in named:
            driver = device / "driver"
            name = f"{VENDORS.get(vendor, vendor)} {model}"
            found.append(Gpu(name, driver.resolve().name if driver.exists() else None))
    return found


def _nvidia() -> list[Gpu]:
    told = said(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader,nounits",
    )
    found = []
    for line in (told or "").splitlines():
        name, driver, size = ([part.strip() for part in line.split(",")] + [""] * 3)[:3]
        if name and driver:
            memory = int(size) << 20 if size.isdigit() else None
            found.append(Gpu(name, f"nvidia {driver}", memory))
    return found


def modules(path: Path = DMI) -> Modules | None:
    """From udev's copy of the DMI table; the keys are those of systemd's dmi_memory_id."""
    told: dict[str, dict[str, str]] = {}
    for line in lines(path):
        key, _, value = line.removeprefix("E:MEMORY_DEVICE_").partition("=")
        number, _, name = key.partition("_")
        if line.startswith("E:MEMORY_DEVICE_") and number.isdecimal():
            told.setdefault(number, {})[name] = value
    there = [d for d in told.values() if d.get("SIZE", "").isdecimal() and int(d["SIZE"])]
    if not there:
        return None
    places = [f"{d.get('BANK_LOCATOR', '')} {d.get('LOCATOR', '')}" for d in there]
    channels = {p[: found.end()].lower() for p in places if (found := CHANNEL.search(p))}
    speeds = {d.get("CONFIGURED_SPEED_MTS") or d.get("SPEED_MTS") or "" for d in there}
    return Modules(
        count=len(there),
        nbytes=sum(int(d["SIZE"]) for d in there),
        type=", ".join(sorted({d["TYPE"] for d in there if "TYPE" in d})) or None,
        speed=min((int(s) for s in speeds if s.isdecimal()), default=None),
        channels=len(channels) or None,
    )


def distribution() -> str | None:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return None


def container(root: Path = Path("/")) -> str:
    """The container's manager and image; "none seen" where nothing tells of one."""
    for line in lines(root / "run/.containerenv"):  # podman's; empty for a user without rights
        key, _, value = line.partition("=")
        if key == "image":
            return f"podman, image {value.strip(chr(34))}"
    seen = {
        "podman": (root / "run/.containerenv").exists(),
        "docker": (root / ".dockerenv").exists(),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
    }
    manager = next((name for name, there in seen.items() if there), None)
    manager = manager or contents(root / "run/systemd/container")
    return f"{manager}, image unknown" if manager else "none seen"


def commit(package: Path) -> str | None:
    """Of the checkout that this package is run from, with "changed" where it was; None for an
    installed one."""
    here = ("git", "-C", str(package))
    if said(*here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # in a checkout of something else, or in none
    head = said(*here, "rev-parse", "HEAD")
    changed = said(*here, "status", "--porcelain", "--untracked-files=no")
    return head and head.strip() + (" (changed)" if changed else "")

"""Classes of devices, as extended resources name them. Pure."""

from __future__ import annotations

from hypeman.devices.types import Device, DeviceType

CLASS = "hypeman.dev/class"
"""Tag of a registered device: the name of its class."""


def device_class(device: Device) -> str:
    """Its tag, else ``<vendor>-<device>`` in hexadecimal; empty if it is not a GPU."""
    if device.type is not DeviceType.GPU:
        return ""
    return (device.tags or {}).get(CLASS) or f"{device.vendor_id}-{device.device_id}".replace("0x", "")

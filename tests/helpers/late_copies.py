"""Copies between device and host that end as late as they may."""

from icegrt.residency import Copies


class LateCopies(Copies):
    """Copies to the device that are made when they are waited for; until then there are bytes that nothing may read."""

    def __init__(self):
        self.pending = []

    def mark_to_device(self):
        return len(self.pending)

    def to_device(self, device, host):
        device.fill_(255)
        self.pending.append((device, host))

    def wait(self, mark):
        for device, host in self.pending:
            device.copy_(host)
        self.pending.clear()

// PCI devices: the registered ones, those that can be passed through, and why others cannot.
import { useSignal } from "@preact/signals";
import type { AvailableDevice, Device } from "api-types";
import { missingScope, post, remove, segment } from "../api";
import { instances } from "../live";
import { openDialog, Button, Check, notifyError, Empty, Link, Page, Panel, Problem, Table, notify, useResource, useWork } from "../ui";

export function Devices() {
  const all = useSignal(true);
  const readable = !missingScope("device:read");
  const registered = useResource<Device[]>(readable ? "/devices" : "", ["device"]);
  const available = useResource<AvailableDevice[]>(readable ? `/devices/available${all.value ? "?all=true" : ""}` : "", ["device"]);
  const [busy, work] = useWork();
  const devices = registered.data ?? [];
  const taken = new Set(devices.map((one) => one.pci_address));
  async function destroy(device: Device) {
    const sure = await openDialog({ title: `Unregister ${device.name}?`, action: "Unregister", danger: true, text: "It stays with the host and can be registered again." });
    if (sure !== null) await remove(`/devices/${segment(device.id)}`).then(() => { registered.reload(); available.reload(); }, notifyError);
  }
  return (
    <Page title="Devices" subtitle="PCI functions that a guest can have for itself.">
      {!readable && <Empty icon="shield" title="Not permitted">{missingScope("device:read")}.</Empty>}
      {(registered.error || available.error) && <Problem message={registered.error || available.error} onRetry={() => { registered.reload(); available.reload(); }} />}
      <Panel title="Registered" flush>
        {devices.length ? <Table label="Registered devices" rows={devices} id={(one) => one.id} columns={[
          { title: "Name", cell: (one) => <span class="two"><b>{one.name}</b><small class="mono">{one.pci_address}</small></span> },
          { title: "Type", cell: (one) => (one.type === "gpu" ? "GPU" : "PCI") },
          { title: "Used by", cell: (one) => one.attached_to ? <Link to={`/instances/${one.attached_to}`}>{instances.value.get(one.attached_to)?.name ?? one.attached_to}</Link> : <span class="muted">nobody</span> },
          { title: "State", cell: (one) => one.missing ? <span class="pill bad">not in the host now</span> : one.bound_to_vfio ? "held for a guest" : "with the host", narrow: true },
          { title: "IOMMU group", cell: (one) => one.iommu_group, class: "number", narrow: true },
          { title: "", class: "end", cell: (one) => <Button kind="plain" icon="trash" scope="device:delete" unavailable={one.attached_to ? "An instance has it" : undefined} label={`Unregister ${one.name}`} onClick={() => destroy(one)} /> },
        ]} /> : registered.data && <Empty icon="devices" title="No device is registered">A registered device can be given to an instance when it is created.</Empty>}
      </Panel>
      <Panel title="In this host" flush actions={<Check checked={all.value} onValue={(value) => { all.value = value; }}>Show those that cannot be passed through</Check>}>
        {available.data?.length ? <Table label="Devices of the host" rows={available.data} id={(one) => one.pci_address} columns={[
          { title: "Device", cell: (one) => <span class="two"><b>{one.device_name ?? `${one.vendor_id}:${one.device_id}`}</b><small>{one.vendor_name ?? one.vendor_id}</small></span> },
          { title: "Address", cell: (one) => <span class="mono">{one.pci_address}</span>, narrow: true },
          { title: "Driver", cell: (one) => one.current_driver ?? <span class="muted">none</span>, narrow: true },
          { title: "Passthrough", cell: (one) => one.reason ? <span class="reason">{one.reason}</span> : <span class="pill good">possible</span> },
          { title: "", class: "end", cell: (one) => !one.reason && <Button scope="device:write" unavailable={taken.has(one.pci_address) ? "It is registered" : undefined} busy={busy === one.pci_address}
            onClick={() => work(one.pci_address, async () => { await post("/devices", { pci_address: one.pci_address }); registered.reload(); notify(`${one.pci_address} was registered`); })}>Register</Button> },
        ]} /> : available.data && <Empty icon="devices" title="No PCI device can be passed through">Passthrough needs an IOMMU (VT-d or AMD-Vi) that is switched on in the firmware.</Empty>}
      </Panel>
    </Page>
  );
}

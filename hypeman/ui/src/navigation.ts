// The pages, with the letter that follows g.
import type { IconName } from "./ui";

export const PAGES: readonly { path: string; title: string; icon: IconName; key: string }[] = [
  { path: "/instances", title: "Instances", icon: "instances", key: "i" },
  { path: "/images", title: "Images", icon: "images", key: "m" },
  { path: "/builds", title: "Builds", icon: "build", key: "b" },
  { path: "/volumes", title: "Volumes", icon: "volumes", key: "v" },
  { path: "/ingresses", title: "Ingresses", icon: "ingress", key: "n" },
  { path: "/approvals", title: "Approvals", icon: "shield", key: "a" },
  { path: "/devices", title: "Devices", icon: "devices", key: "d" },
  { path: "/usage", title: "Usage", icon: "usage", key: "u" },
  { path: "/host", title: "Host", icon: "host", key: "h" },
  { path: "/events", title: "Events", icon: "events", key: "e" },
];

// A graph over time, by uPlot.
import { effect } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { dark } from "../theme";

type Series = { label: string; tone: string; values: readonly number[] };
type Props = { title: string; now: string; detail: string; times: readonly number[]; series: readonly Series[]; max?: number; binary?: boolean; format: (value: number) => string };

const HEIGHT = 116;
/** Seconds that are shown at least. */
const WINDOW = 60;
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);

export function Chart({ title, now, detail, times, series, max, binary, format }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const data = (): uPlot.AlignedData => [times.map((time) => time / 1000), ...series.map((one) => [...one.values])];
  useEffect(() => {
    const element = place.current!;
    const make = () => {
      plot.current?.destroy();
      const style = getComputedStyle(document.documentElement);
      const read = (name: string) => style.getPropertyValue(name).trim();
      const axis = { stroke: read("--muted"), font: "10.5px system-ui, sans-serif", grid: { stroke: read("--line"), width: 1 }, ticks: { show: false } };
      plot.current = new uPlot({
        width: Math.max(160, element.clientWidth), height: HEIGHT, padding: [6, 6, 0, 0], cursor: { y: false, points: { size: 5 } }, legend: { show: false },
        scales: { x: { range: (_, low, high) => [Math.min(low, high - WINDOW), high] }, y: { range: (_, _low, high) => [0, max ?? Math.max(1024, high * 1.15)] } },
        axes: [{ ...axis, size: 22, values: (_, splits) => splits.map((at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false })), space: 90 },
          { ...axis, size: 52, values: (_, splits) => splits.map(format), space: 34, ...(binary ? { incrs: POWERS } : {}) }],
        series: [{}, ...series.map((one) => ({ label: one.label, stroke: read(`--${one.tone}`), width: 1.5, fill: read(`--${one.tone}-fill`), points: { show: false } }))],
      }, data(), element);
    };
    const stop = effect(() => { dark.value; queueMicrotask(make); });
    const observer = new ResizeObserver(() => plot.current?.setSize({ width: Math.max(160, element.clientWidth), height: HEIGHT }));
    observer.observe(element);
    return () => { stop(); observer.disconnect(); plot.current?.destroy(); plot.current = undefined; };
  }, [max]);
  useEffect(() => { plot.current?.setData(data()); }, [times.at(-1)]);
  return (
    <section class="panel chart" aria-label={`${title}: ${now} ${detail}`}>
      <div class="chart-head">
        <h2>{title}</h2>
        {series.length > 1 && <div class="chart-legend">{series.map((one) => <span key={one.tone}><i class={`tone-${one.tone}`} />{one.label}</span>)}</div>}
        <span><b>{now}</b> <span class="muted">{detail}</span></span>
      </div>
      <div ref={place} class="chart-place" />
    </section>
  );
}

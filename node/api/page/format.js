// Figures as people read them.

const UNITS = ["", "k", "M", "G", "T"];

/** Three digits at least, a unit where there are many: 54.5, 612, 14.6k. */
export function figure(value) {
  if (!Number.isFinite(value) || value <= 0) return "–";
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return (value < 99.95 ? value.toFixed(value < 9.995 ? 2 : 1) : value.toFixed(0)) + UNITS[unit];
}

/** A count of things. */
export function count(value) {
  if (!Number.isFinite(value)) return "–";
  return value < 100_000 ? String(Math.round(value)) : figure(value);
}

/** A short time. */
export function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${(seconds * 1000).toFixed(0)} ms`;
  return seconds < 99.5 ? `${seconds.toFixed(seconds < 9.95 ? 2 : 1)} s` : `${(seconds / 60).toFixed(0)} min`;
}

/** A share. */
export function percent(share) {
  return share === null || !Number.isFinite(share) ? "–" : `${Math.round(share * 100)} %`;
}

/** The time of day of a moment in Unix seconds. */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

/** A peer id is too long to read; its end tells it from others. */
export function shortId(peerId) {
  return `…${peerId.slice(-8)}`;
}

/** "1 node", "2 nodes". */
export function plural(number, thing) {
  return `${number} ${thing}${number === 1 ? "" : "s"}`;
}

/** Blocks as the command line writes them. */
export function span([start, end]) {
  return `${start}:${end}`;
}

/** How loaded something is, as a word for the style sheet. */
export function loadLevel(share) {
  if (share === null || share === undefined) return "unknown";
  if (share < 0.5) return "calm";
  return share < 0.85 ? "busy" : "full";
}

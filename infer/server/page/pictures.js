// What the server does, from its /metrics: read once a second, drawn over the last minute.
const POINTS = 60, EVERY_MS = 1000, WINDOW = 10, LONG_WINDOW = 60;
const SVG = "http://www.w3.org/2000/svg";

function readMetrics(text) {
  const values = new Map();
  for (const line of text.split("\n")) {
    const at = line.lastIndexOf(" ");
    if (line && line[0] !== "#" && at > 0) values.set(line.slice(0, at).replace(/^lockstep_/, ""), Number(line.slice(at + 1)));
  }
  const sample = { at: performance.now() / 1000, values };
  sample.one = (name) => values.get(name) ?? 0;
  sample.sum = (name, label) => {
    let sum = 0;
    for (const [key, value] of values) if (key.startsWith(name + "{") && key.includes(label)) sum += value;
    return sum;
  };
  sample.buckets = (name) => {
    const found = [], start = name + '_bucket{le="';
    for (const [key, value] of values) {
      if (key.startsWith(start)) found.push([Number(key.slice(start.length, -2).replace("+Inf", "Infinity")), value]);
    }
    return found;
  };
  return sample;
}

// The value that so large a share of what was observed between two samples did not exceed, within its bucket by a straight line.
function quantile(before, now, name, share) {
  const old = before.buckets(name).map((bucket) => bucket[1]);
  const counts = now.buckets(name).map(([bound, count], index) => [bound, count - (old[index] ?? 0)]);
  const total = counts.length ? counts[counts.length - 1][1] : 0;
  if (total <= 0) return null;
  let low = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= share * total) return bound === Infinity ? low : low + (bound - low) * ((share * total - below) / (count - below));
    low = bound; below = count;
  }
  return low;
}

function mean(before, now, name) {
  const count = now.one(name + "_count") - before.one(name + "_count");
  return count > 0 ? (now.one(name + "_sum") - before.one(name + "_sum")) / count : null;
}

const whole = (value) => Math.round(value).toLocaleString("en");
const short = (value) => (value >= 100 ? whole(value) : value >= 10 ? value.toFixed(1) : value.toFixed(value >= 1 ? 1 : 2)).replace(/\.0+$/, "");
const percent = (value) => [value > 0 && value < 0.1 ? (100 * value).toFixed(1) : whole(100 * value), "%"];
const seconds = (value) => (value >= 1 ? [short(value), "s"] : [short(1000 * value), "ms"]);
const spoken = (pair) => pair.join(" ");

function latency(name) {
  return {
    read: (now, early) => [mean(early, now, name), quantile(early, now, name, 0.9)],
    form: seconds, legend: ["mean", "90th percentile"],
  };
}

const CARDS = [
  {
    title: "Requests", legend: ["running", "waiting"], form: (value) => [whole(value), "running"], whole: true,
    read: (now) => [now.one("engine_running"), now.one("engine_waiting") + now.one("engine_swapped")],
  },
  {
    title: "Tokens generated", legend: ["each second"], form: (value) => [value < 10 ? short(value) : whole(value), "tokens/s"],
    read: (now, early, last) => {
      const told = (sample) => sample.one("time_per_token_seconds_count") + sample.one("time_to_first_token_seconds_count");
      return [last === now ? 0 : (told(now) - told(last)) / (now.at - last.at)];
    },
  },
  { title: "Time to first token", ...latency("time_to_first_token_seconds") },
  { title: "Time per token", ...latency("time_per_token_seconds") },
  {
    title: "Cache of keys and values", legend: ["in use", "kept for prefixes"], form: percent, top: 1,
    read: (now) => {
      const pages = (state) => now.sum("kv_pages_device", `state="${state}"`);
      const all = pages("free") + pages("cached") + pages("used");
      return all ? [pages("used") / all, pages("cached") / all] : [null, null];
    },
  },
  {
    title: "Prefix hits", legend: ["of the prompts of a minute"], form: percent, top: 1, window: LONG_WINDOW,
    read: (now, early) => {
      const asked = now.one("prompt_tokens_total") - early.one("prompt_tokens_total");
      return [asked > 0 ? (now.one("prompt_tokens_cached_total") - early.one("prompt_tokens_cached_total")) / asked : null];
    },
    more: (now) => `${whole(now.one("prefix_hit_tokens_total"))} tokens so far`,
  },
];

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ceiling(value, wholes) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const found = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((bound) => bound >= value * 0.999);
  return wholes ? Math.max(1, Math.ceil(found)) : found;
}

class Card {
  constructor(about) {
    this.about = about;
    this.lines = about.legend.map(() => []);
    this.figure = element("figure", "card");
    const top = element("div", "top");
    this.now = element("div", "now", "–");
    top.append(element("h2", "", about.title), this.now);
    this.svg = drawn("svg", { role: "img", "aria-label": `${about.title}: nothing yet` });
    const caption = element("figcaption");
    this.notes = about.legend.map((name, index) => {
      const note = element("b", about.legend.length === 1 ? "plain" : index ? "two" : "", name);
      caption.append(note);
      return note;
    });
    this.extra = element("b", "span", about.more ? "" : "last minute");
    caption.append(this.extra);
    this.figure.append(top, this.svg, caption);
  }

  clear() { for (const line of this.lines) line.length = 0; }

  take(history) {
    const now = history[history.length - 1], about = this.about;
    const at = (back) => history[Math.max(0, history.length - 1 - back)];
    const values = now.one("engine_up") || !about.top ? about.read(now, at(about.window ?? WINDOW), at(2)) : about.legend.map(() => null);
    values.forEach((value, index) => {
      this.lines[index].push(value);
      if (this.lines[index].length > POINTS) this.lines[index].shift();
      const said = about.legend[index];
      this.notes[index].textContent = index && value !== null ? `${said} ${spoken(about.whole ? [whole(value)] : about.form(value))}` : said;
    });
    const shown = values[0] === null ? null : about.form(values[0]);
    this.now.replaceChildren(shown ? shown[0] : "–");
    if (shown) this.now.append(element("small", "", shown[1]));
    if (about.more) this.extra.textContent = about.more(now);
    this.svg.setAttribute("aria-label", `${about.title}: ${shown ? spoken(shown) : "nothing yet"}`);
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    const about = this.about, known = this.lines.flat().filter((value) => value !== null);
    const top = about.top ?? ceiling(Math.max(0, ...known), about.whole);
    const x = (index, count) => width - 3 - ((count - 1 - index) * (width - 3)) / (POINTS - 1);
    const y = (value) => height - 1 - (Math.min(value, top) / top) * (height - 12);
    const parts = [
      drawn("line", { class: "rule top", x1: 0, x2: width, y1: 11, y2: 11 }),
      drawn("line", { class: "rule", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 }),
      drawn("text", { x: 0, y: 7 }, !known.length ? "" : about.whole ? whole(top) : about.form(top).join(about.top ? "" : " ")),
    ];
    for (let place = this.lines.length - 1; place >= 0; place--) {
      const line = this.lines[place], kind = place ? " two" : "";
      for (const run of runs(line)) {
        const path = run.map((index) => `${x(index, line.length).toFixed(1)},${y(line[index]).toFixed(1)}`);
        const [first, last] = [x(run[0], line.length), x(run[run.length - 1], line.length)];
        if (!place) parts.push(drawn("path", { class: "area", d: `M${first},${height - 1}L${path.join("L")}L${last},${height - 1}Z` }));
        parts.push(drawn("path", { class: "stroke" + kind, d: `M${path.join("L")}` }));
      }
      const last = line.length - 1;
      if (last >= 0 && line[last] !== null) parts.push(drawn("circle", { class: "dot" + kind, cx: x(last, line.length), cy: y(line[last]), r: 2.6 }));
    }
    this.svg.replaceChildren(...parts);
  }
}

function runs(line) {
  const found = [];
  line.forEach((value, index) => {
    if (value === null) return;
    if (index && line[index - 1] !== null) found[found.length - 1].push(index);
    else found.push([index]);
  });
  return found;
}

class Pictures {
  constructor(place, fetched, told) {
    this.fetched = fetched; this.told = told; this.history = []; this.stopped = false; this.timer = 0;
    this.cards = CARDS.map((about) => new Card(about));
    place.append(...this.cards.map((card) => card.figure));
    new ResizeObserver(() => this.cards.forEach((card) => card.draw())).observe(place);
    document.addEventListener("visibilitychange", () => this.go());
  }

  go() {
    clearTimeout(this.timer);
    if (!document.hidden && !this.stopped) this.look();
  }

  async look() {
    clearTimeout(this.timer);
    const began = performance.now();
    try {
      const response = await this.fetched("/metrics");
      if (response.status === 401) { this.told("away", "needs a key"); return; }
      if (!response.ok) throw new Error(String(response.status));
      this.take(readMetrics(await response.text()));
    } catch {
      this.told("away", "not reachable");
    }
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => this.look(), Math.max(100, EVERY_MS - (performance.now() - began)));
  }

  take(sample) {
    const last = this.history[this.history.length - 1];
    if (last && sample.one("time_to_first_token_seconds_count") < last.one("time_to_first_token_seconds_count")) {
      this.history.length = 0; // the server was started again: its counters began at nothing
      this.cards.forEach((card) => card.clear());
    }
    this.history.push(sample);
    if (this.history.length > LONG_WINDOW + 1) this.history.shift();
    this.cards.forEach((card) => card.take(this.history));
    if (sample.one("draining")) this.told("waiting", "shutting down");
    else if (!sample.one("engine_up")) this.told("waiting", "engine is starting");
    else this.told("ready", "ready");
  }
}

// What the engine does, live. Owns the numbers that are shown; charts.js draws, feed.js fetches, chat.js talks.

import { cacheChart, gapChart, stepChart } from "./charts.js";
import { startChat } from "./chat.js";
import { call, events, key } from "./feed.js";

const STEPS = 150;
const SECONDS = 60;
const AGAIN_MS = 2000;
const byId = (id) => document.getElementById(id);
const show = (id, text) => (byId(id).textContent = text);

function tell(text, kind = "") {
  show("status", text);
  byId("status").className = `badge ${kind}`;
}

// Snapshots of the last minute: differences of counts, and the pages over time.
class Minute {
  #kept = [];

  add(snapshot) {
    const last = this.#kept.at(-1);
    if (last && snapshot.output_tokens < last.output_tokens) this.#kept = []; // the server's counts began anew
    this.#kept.push(snapshot);
    while (this.#kept[0].at < snapshot.at - SECONDS * 1000) this.#kept.shift();
  }

  get all() {
    return this.#kept;
  }

  // Of the last so many seconds, from the oldest snapshot in them.
  since(seconds) {
    const now = this.#kept.at(-1);
    const then = this.#kept.find((one) => one.at >= now.at - seconds * 1000) ?? now;
    return { then, now, seconds: (now.at - then.at) / 1000 };
  }
}

const rate = (count, seconds) => (seconds > 0 ? Math.round(count / seconds).toLocaleString("en") : "-");

// The upper end of the range below which so many of the values lie.
function quantile(bounds, counts, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  let seen = 0;
  for (const [index, count] of counts.entries()) {
    seen += count;
    if (total && seen >= share * total) return bounds[index] ?? bounds.at(-1);
  }
  return null;
}

function cells(values) {
  const row = document.createElement("tr");
  for (const value of values) {
    const cell = document.createElement("td");
    cell.append(value);
    row.append(cell);
  }
  return row;
}

function bar(value, most) {
  const found = document.createElement("progress");
  found.max = most || 1;
  found.value = value;
  return found;
}

function showRequests(requests) {
  byId("requests").replaceChildren(
    ...requests.slice(0, 12).map((one) =>
      cells([
        `${(one.age_ms / 1000).toFixed(1)} s`,
        one.priority,
        one.cached_tokens ? `${one.prompt_tokens} (${one.cached_tokens} cached)` : one.prompt_tokens,
        one.state === "running" ? `${one.output_tokens} of ${one.max_tokens}` : one.state === "held" ? "waits for its client's turn" : "waits",
        bar(one.output_tokens, one.max_tokens),
      ]),
    ),
  );
  show("requests-note", requests.length ? `${requests.length} open, the oldest first.` : "None is open: send one below, or with curl.");
}

function showQueue(waiting, held) {
  const classes = [...waiting.keys()].map((number) => ({ number, count: waiting[number] + (held[number] ?? 0) })).reverse();
  const some = classes.filter((one) => one.count);
  if (!some.length) {
    byId("queue").replaceChildren(Object.assign(document.createElement("p"), { className: "nobody", textContent: "Nobody waits." }));
    return;
  }
  const most = Math.max(...some.map((one) => one.count));
  byId("queue").replaceChildren(
    ...some.map(({ number, count }) => {
      const row = Object.assign(document.createElement("div"), { className: "class" });
      row.append(`priority ${number}`, bar(count, most), String(count));
      return row;
    }),
  );
}

class Panels {
  #minute = new Minute();
  #steps = { decodes: [], chunks: [], paddings: [], ms: [] };
  #target = null;
  #drawSteps = stepChart(STEPS);
  #drawGaps = gapChart();
  #drawCache = cacheChart(SECONDS);
  #numSteps = 0;

  take(snapshot) {
    tell(snapshot.serves ? "serving" : "the engine is being started again", snapshot.serves ? "ok" : "bad");
    snapshot.at = performance.now();
    this.#minute.add(snapshot);
    this.#takeSteps(snapshot.steps);
    this.#showTiles(snapshot);
    this.#showGaps(snapshot);
    this.#showCache(snapshot);
    showQueue(snapshot.waiting, snapshot.held);
    showRequests(snapshot.requests);
  }

  #takeSteps(steps) {
    const add = (kept, more) => kept.concat(more).slice(-STEPS);
    this.#steps = {
      decodes: add(this.#steps.decodes, steps.decode_rows),
      chunks: add(this.#steps.chunks, steps.chunk_rows),
      paddings: add(this.#steps.paddings, steps.padding_rows),
      ms: add(this.#steps.ms, steps.ms),
    };
    this.#drawSteps(this.#steps);
    this.#numSteps += steps.ids.length;
    byId("steps").dataset.drawn = this.#numSteps;
  }

  #showTiles(snapshot) {
    const { then, now, seconds } = this.#minute.since(3);
    const sum = (counts) => counts.reduce((all, count) => all + count, 0);
    show("running", snapshot.running);
    show("waiting", sum(snapshot.waiting) + sum(snapshot.held));
    show("output-rate", rate(now.output_tokens - then.output_tokens, seconds));
    show("prompt-rate", rate(now.prefix_queries - then.prefix_queries, seconds));
    const minute = this.#minute.since(SECONDS);
    const queries = minute.now.prefix_queries - minute.then.prefix_queries;
    const hits = minute.now.prefix_hits - minute.then.prefix_hits;
    show("hits", queries ? `${Math.round((100 * hits) / queries)} %` : "-");
  }

  #showGaps(snapshot) {
    const { then } = this.#minute.since(SECONDS);
    const counts = snapshot.itl_counts.map((count, index) => count - then.itl_counts[index]);
    const targets = snapshot.requests.map((one) => one.itl_target_ms).filter((one) => one !== null);
    if (targets.length) this.#target = Math.min(...targets);
    this.#drawGaps(snapshot.itl_bounds_ms, counts, this.#target);
    const [half, most] = [0.5, 0.99].map((share) => quantile(snapshot.itl_bounds_ms, counts, share));
    show("itl", half === null ? "-" : `${half} / ${most} ms`);
    const misses = snapshot.itl_misses - then.itl_misses;
    const wanted = snapshot.itl_wanted - then.itl_wanted;
    show("itl-note", wanted ? `${misses} of ${wanted} that had a target were longer than it.` : "None had a target.");
  }

  #showCache(snapshot) {
    const all = this.#minute.all;
    const used = all.map((one) => one.pages_total - one.pages_free);
    this.#drawCache(
      all.map((one) => (one.at - snapshot.at) / 1000),
      used,
      all.map((one) => one.pages_cached),
      all.map((one) => one.pages_total),
    );
    show("used", used.at(-1));
    show("cached", snapshot.pages_cached);
    show("free", snapshot.pages_free - snapshot.pages_cached);
  }
}

// Until the key is not taken any more. A server that is away is asked again.
async function watch(panels) {
  for (;;) {
    try {
      for await (const snapshot of events("v1/engine/steps")) {
        if (snapshot.error) tell(snapshot.error.message, "bad");
        else panels.take(snapshot);
      }
    } catch (error) {
      if (error.status === 401) return;
      tell(error.status ? error.message : "the server does not answer", "bad");
    }
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

async function start() {
  let models;
  try {
    models = await (await call("v1/models")).json();
  } catch (error) {
    tell(error.status === 401 ? "needs a key" : error.message, "bad");
    byId("ask-key").hidden = error.status !== 401;
    if (error.status === 401 && key.get()) tell("that key is not known here", "bad");
    if (error.status !== 401) setTimeout(start, AGAIN_MS);
    return;
  }
  byId("ask-key").hidden = true;
  byId("forget").hidden = !key.get();
  document.querySelector("main").hidden = false;
  show("model", models.data[0].id);
  startChat(models.data[0].id);
  await watch(new Panels());
  location.reload();
}

byId("ask-key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  start();
});
byId("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
start();

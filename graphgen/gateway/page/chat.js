// The playground: a chat with the model, how fast its tokens come, and how sure it was of each.

import { events } from "./feed.js";

const byId = (id) => document.getElementById(id);
const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

function addTurn(kind, text) {
  const turn = Object.assign(document.createElement("div"), { className: `turn ${kind}`, textContent: text });
  byId("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return turn;
}

// Of a token: the less likely it was, the stronger its colour.
function shade(probability) {
  return ["p0", "p1", "p2", "p3"][[0.05, 0.2, 0.5, 0.8].findIndex((bound) => probability < bound)] ?? "";
}

function addTokens(turn, tokens) {
  for (const { token, logprob, top_logprobs: others = [] } of tokens) {
    const share = (value) => `${(100 * Math.exp(value)).toFixed(1)} %`;
    const mark = Object.assign(document.createElement("span"), {
      textContent: token,
      className: shade(Math.exp(logprob)),
      title: [share(logprob), ...others.map((one) => `${share(one.logprob)}  ${JSON.stringify(one.token)}`)].join("\n"),
    });
    turn.append(mark);
  }
}

// Arrival times of what has text.
class Stopwatch {
  #begun = performance.now();
  #times = [];

  tick() {
    this.#times.push(performance.now());
  }

  describe(numTokens) {
    if (!this.#times.length) return "";
    const first = this.#times[0] - this.#begun;
    const took = this.#times.at(-1) - this.#times[0];
    const gaps = this.#times.slice(1).map((time, index) => time - this.#times[index]);
    const parts = [`first token after ${milliseconds(first)} (TTFT)`];
    if (gaps.length) {
      const mean = numTokens > 1 ? took / (numTokens - 1) : took / gaps.length;
      parts.push(`then ${milliseconds(mean)} a token (ITL), the longest gap ${milliseconds(Math.max(...gaps))}`);
    }
    if (numTokens) parts.push(`${numTokens} tokens`);
    return parts.join(" · ");
  }
}

export function startChat(model) {
  let messages = [];
  let asksLogprobs = true;
  let stop = null;

  function question() {
    const target = Number(byId("target").value);
    return {
      model,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      max_completion_tokens: Number(byId("max-tokens").value) || 120,
      temperature: Number(byId("temperature").value),
      ...(target > 0 && { itl_target_ms: target }),
      ...(asksLogprobs && { logprobs: true, top_logprobs: 3 }),
    };
  }

  async function answer(turn) {
    const watch = new Stopwatch();
    const figures = Object.assign(document.createElement("div"), { className: "figures", textContent: "waits for its first token" });
    turn.after(figures);
    let [text, numTokens, sure] = ["", 0, false];
    for await (const chunk of events("v1/chat/completions", { body: question(), signal: stop.signal })) {
      if (chunk.error) throw new Error(chunk.error.message);
      numTokens = chunk.usage?.completion_tokens ?? numTokens;
      const choice = chunk.choices[0];
      const piece = choice?.delta?.content ?? "";
      const thought = choice?.delta?.reasoning_content ?? "";
      if (!piece && !thought) continue;
      watch.tick();
      if (thought) turn.append(Object.assign(document.createElement("span"), { className: "thought", textContent: thought }));
      text += piece;
      const tokens = choice.logprobs?.content;
      sure ||= Boolean(tokens?.length);
      if (piece && tokens?.length) addTokens(turn, tokens);
      else turn.append(piece);
      figures.textContent = watch.describe(numTokens);
      byId("turns").scrollTop = byId("turns").scrollHeight;
    }
    figures.textContent = watch.describe(numTokens) + (sure ? " · the stronger a token's colour, the less likely it was" : "");
    return text;
  }

  async function send() {
    messages.push({ role: "user", content: byId("prompt").value });
    addTurn("user", byId("prompt").value);
    byId("prompt").value = "";
    const turn = addTurn("assistant", "");
    stop = new AbortController();
    byId("send").disabled = true;
    byId("stop").hidden = false;
    try {
      const text = await answer(turn).catch((error) => {
        if (error.param !== "logprobs") throw error;
        asksLogprobs = false; // a server without them
        turn.nextElementSibling.remove();
        return answer(turn);
      });
      messages.push({ role: "assistant", content: text });
    } catch (error) {
      if (turn.nextElementSibling?.className === "figures") turn.nextElementSibling.textContent = "";
      if (error.name !== "AbortError") addTurn("error", error.message);
      messages.push({ role: "assistant", content: turn.textContent });
    } finally {
      byId("send").disabled = false;
      byId("stop").hidden = true;
    }
  }

  byId("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !byId("send").disabled) {
      event.preventDefault();
      byId("chat").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => stop.abort());
  byId("clear").addEventListener("click", () => {
    messages = [];
    byId("turns").replaceChildren();
  });
}

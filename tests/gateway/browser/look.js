// node look.js CHROMIUM URL KEY [PICTURE]: opens the page, chats, and says as JSON what it saw. KEY may be empty.
// PICTURE: a file that gets a picture of the page while requests run.

import { chromium } from "playwright-core";

const [executablePath, url, key, picture] = process.argv.slice(2);
const seen = { errors: [], requests: [] };

// An answer with log-probabilities, whether or not the server has them.
async function colours(page) {
  const choice = (content) => ({ choices: [{ index: 0, delta: { content: content.map((one) => one.token).join("") }, logprobs: { content } }] });
  const chunks = [
    choice([{ token: "sure", logprob: -0.01, top_logprobs: [] }, { token: " and", logprob: -1.2, top_logprobs: [] }]),
    choice([{ token: " <b>unlikely</b>", logprob: -6, top_logprobs: [{ token: " likely", logprob: -0.1 }] }]),
  ];
  const body = chunks.map((one) => `data: ${JSON.stringify(one)}\n\n`).join("") + "data: [DONE]\n\n";
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body }));
  await page.fill("#prompt", "And now?");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelectorAll(".turn.assistant:last-of-type span, .turn.assistant span").length >= 3);
  const found = await page.locator(".turn.assistant span").evaluateAll((all) => all.map((one) => [one.textContent, one.className]));
  await page.unroute("**/v1/chat/completions");
  return found;
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, deviceScaleFactor: 1 });
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.goto(url);
  if (key) {
    await page.fill("#key", "wrong");
    await page.click("#ask-key button");
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("not known"));
    seen.errors.length = 0; // the browser reports each 401
    await page.fill("#key", key);
    await page.click("#ask-key button");
  }
  await page.waitForSelector("#status.ok");
  seen.model = await page.textContent("#model");
  seen.kept = await page.evaluate(() => [sessionStorage.length, localStorage.length, document.cookie]);

  await page.fill("#max-tokens", "40");
  await page.fill("#target", "1000");
  await page.fill("#prompt", "Good morrow!");
  await page.press("#prompt", "Enter");
  await page.waitForFunction(() => document.querySelector("#requests").rows.length > 0);
  seen.row = await page.textContent("#requests tr");
  await page.waitForFunction(() => /\d+ tokens/.test(document.querySelector(".figures")?.textContent));
  await page.waitForSelector("#stop", { state: "hidden" });
  seen.figures = await page.textContent(".figures");
  seen.answer = await page.textContent(".turn.assistant");
  await page.waitForFunction(() => Number(document.querySelector("#steps").dataset.drawn) >= 40);
  await page.waitForFunction(() => /\d/.test(document.querySelector("#itl").textContent));
  seen.note = await page.textContent("#itl-note");
  // What a chart shows is what its canvas has: pixels of the decodes' colour.
  seen.painted = await page.evaluate(() =>
    Object.fromEntries(
      ["steps", "gaps"].map((id) => {
        const canvas = document.querySelector(`#${id} canvas`);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let at = 0; at < data.length; at += 4) count += data[at] === 13 && data[at + 1] === 148 && data[at + 2] === 136;
        return [id, count];
      }),
    ),
  );
  if (picture) {
    await page.waitForTimeout(Number(process.env.WAIT_MS ?? 0));
    await page.screenshot({ path: picture, fullPage: true });
  }
  seen.coloured = await colours(page);
  if (key) {
    await page.click("#forget");
    await page.waitForSelector("#ask-key", { state: "visible" });
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));

// Checks the page in Chromium; `tests/page` starts the gateway and sets the variables.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import puppeteer from "puppeteer-core";

const { BROWSER, HTTP, LISTEN, PROGRAM, SIMULATOR, WORK, PICTURES } = process.env;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const DATA = `${WORK}/data`;
const PATIENCE = { timeout: 60_000, polling: 100 };

// Starts a program; returns it with the promise of its exit code.
function start(program, ...args) {
  const child = spawn(program, args, { stdio: ["ignore", "ignore", "inherit"] });
  return { child, exit: once(child, "exit").then(([code]) => code) };
}

function simulate(devices, journal, ...args) {
  return start(SIMULATOR, "run", "--gateway", LISTEN, "--devices", devices, "--journal", `${WORK}/${journal}`,
    "--key-file", `${DATA}/fleet.key`, "--seed", "7", ...args);
}

const browser = await puppeteer.launch({ executablePath: BROWSER, args: ["--no-sandbox"] });
const mistakes = [];

async function open(path, width = 1440, scheme = "light") {
  const page = await browser.newPage();
  page.on("pageerror", (error) => mistakes.push(`${path}: ${error}`));
  page.on("console", (message) => message.type() === "error" && mistakes.push(`${path}: ${message.text()}`));
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(HTTP + path, { waitUntil: "load" });
  return page;
}

// Waits until the text of an element is as expected, without a reload. A page in the background is not updated.
async function shows(page, selector, pattern) {
  await page.bringToFront();
  const holds = (selector, source) => {
    const element = document.querySelector(selector);
    return element !== null && new RegExp(source).test(element.textContent);
  };
  await page.waitForFunction(holds, PATIENCE, selector, pattern.source);
}

// The numbers move while the page is open, and a device that goes away shows.
const fleet = await open("/");
await shows(fleet, "#connection", /live/);
const device = simulate(1, "one", "--frames", "20", "--profile", "burst", "--faults", "malformed=0.2");
assert.equal(await device.exit, 0);
const interval = start(PROGRAM, "device", "set", "sim-00000", "--interval", "2s", "--data-dir", DATA);
assert.equal(await interval.exit, 0);
const others = simulate(60, "others", "--duration", "60s", "--profile", "steady");
await shows(fleet, "[data-live=online]", /^60$/);
await shows(fleet, "[data-live=readings_now]", /[1-9]/);
await shows(fleet, "#devices", /60 devices/);
const device_page = await open("/devices/sim-00000");
const before = await device_page.$eval("#state", (element) => element.textContent);
await device_page.waitForFunction(
  (before) => document.querySelector("#state").textContent !== before, PATIENCE, before);
others.child.kill("SIGTERM");
await others.exit;
await shows(fleet, "[data-live=late]", /^1$/);
await shows(fleet, "#connection", /^Updates are live/);
await shows(device_page, "#state", /late/);
await device_page.close();

// Sorting, filtering and paging are links and forms.
await fleet.goto(`${HTTP}/?sort=state`);
assert.match(await fleet.$eval("#devices tbody tr", (row) => row.textContent), /sim-00000.*late/);
await fleet.type("input[name=q]", "00059");
await Promise.all([fleet.waitForNavigation(), fleet.keyboard.press("Enter")]);
assert.match(await fleet.$eval("#devices", (part) => part.textContent), /^1 device/);

// Every page fits a phone and a desktop, in both colour schemes, and axe finds nothing serious.
const paths = ["/", "/?q=nothing", "/devices/sim-00000", "/devices/sim-00000?range=30d", "/completeness", "/quarantine",
  "/quarantine/1"];
for (const path of paths) {
  for (const width of [360, 1440]) {
    for (const scheme of ["light", "dark"]) {
      const page = await open(path, width, scheme);
      const excess = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(excess <= 0, `${path} is ${excess} pixels too wide at ${width}`);
      await page.evaluate(axe);
      const found = await page.evaluate(() => axe.run({ resultTypes: ["violations"] }));
      const serious = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
      assert.deepEqual(serious.map((one) => [one.id, one.nodes.map((node) => node.html)]), [], `${path} ${scheme}`);
      if (PICTURES) {
        const name = path.replace(/[^a-z0-9]+/g, "_");
        await page.screenshot({ path: `${PICTURES}/page${name}-${width}-${scheme}.png`, fullPage: true });
      }
      await page.close();
    }
  }
}
// axe does find what is wrong.
const wrong = await open("/");
await wrong.evaluate(() => document.querySelector("input").parentElement.replaceWith(document.querySelector("input")));
await wrong.evaluate(axe);
const found = await wrong.evaluate(() => axe.run());
assert.ok(found.violations.some((one) => one.id === "label"), "axe misses an input without a label");
await wrong.close();

// The keyboard alone reaches a device; the first stop skips the navigation.
const keys = await open("/");
await keys.keyboard.press("Tab");
assert.equal(await keys.evaluate(() => document.activeElement.textContent), "Skip to content");
const isDevice = () => document.activeElement.getAttribute("href") === "/devices/sim-00000";
for (let stops = 0; !(await keys.evaluate(isDevice)); stops++) {
  assert.ok(stops < 40, "no device within 40 stops");
  await keys.keyboard.press("Tab");
}
await Promise.all([keys.waitForNavigation(), keys.keyboard.press("Enter")]);
assert.equal(await keys.$eval("h1", (title) => title.textContent), "sim-00000");
await keys.close();

// Without JavaScript, the pages have the same content.
const plain = await browser.newPage();
await plain.setJavaScriptEnabled(false);
await plain.goto(`${HTTP}/?q=sim-00000`);
const content = await plain.content();
for (const part of ["1 device", "/devices/sim-00000", "late"]) assert.ok(content.includes(part), part);
await plain.goto(`${HTTP}/devices/sim-00000`);
assert.ok((await plain.content()).includes("<svg"), "a chart without JavaScript");

assert.deepEqual(mistakes, []);
await browser.close();
console.log(`the page works in ${BROWSER}`);

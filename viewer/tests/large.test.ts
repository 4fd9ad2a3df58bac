import type { Page } from "playwright-core";
import { describe, expect, test } from "vitest";
import { bench, CHROMIUM, leave } from "./browser";

const ATOMS = 100_000;

const ALONE_MS = 40;

/** How many times as long a fixed loop takes here as on one free core of 2026's servers, at least once. */
async function slowness(page: Page): Promise<number> {
  const taken = await page.evaluate(() => {
    const start = performance.now();
    let state = 1;
    for (let i = 0; i < 30_000_000; i += 1) state = (Math.imul(state, 1103515245) + 12345) | 0;
    return performance.now() - start + (state & 0);
  });
  return Math.max(1, taken / ALONE_MS);
}

// What else the machine does makes a time longer, never shorter: the shortest is the viewer's own.
describe.skipIf(!CHROMIUM)("a site of 100,000 atoms", () => {
  const made = bench("--atoms", String(ATOMS), "--pages", "32", "--examples", "50");

  test("the first atom's page takes less than 300 kB", async () => {
    made.site.sent = 0;
    const visit = await made.open("#/atom/letters/4");
    await visit.page.locator(".example-list").waitFor();
    await visit.page.waitForLoadState("networkidle");
    console.log(`the first page: ${made.site.sent} bytes`);
    expect(made.site.sent).toBeLessThan(300_000);
    expect(made.site.asked.some((path) => path.endsWith("atoms.parquet"))).toBe(false);
    await leave(visit);
  });

  test("the first atom's page is there within a second", async () => {
    const times: number[] = [];
    const slow = await made.open("#/nowhere").then(async (visit) => {
      const found = await slowness(visit.page);
      await leave(visit);
      return found;
    });
    for (let visits = 0; visits < 5; visits += 1) {
      const visit = await made.open("#/atom/letters/4");
      await visit.page.locator(".example-list").waitFor();
      times.push(await visit.page.evaluate(() => performance.now()));
      await leave(visit);
    }
    console.log(`the first page: ${times.map((time) => time.toFixed(0)).join(", ")} ms, ${slow.toFixed(1)} times as slow as alone`);
    expect(Math.min(...times)).toBeLessThan(1_000 * slow);
  });

  test("100 contexts of 64 tokens are fewer than 15,000 elements", async () => {
    const visit = await made.open("#/atom/letters/4?show=all&context=all");
    await expect.poll(() => visit.page.locator(".example-list li").count()).toBe(100);
    expect(await visit.page.locator(".sequence .t").count()).toBe(6_400);
    expect(await visit.page.locator("*").count()).toBeLessThan(15_000);
    await leave(visit);
  });

  test("the next atom is there within 150 ms", async () => {
    const visit = await made.open("#/atom/letters/4");
    const { page } = visit;
    const times: number[] = [];
    for (let atom = 4; atom < 13; atom += 1) {
      await page.locator(".example-list").waitFor();
      await page.waitForLoadState("networkidle");
      times.push(
        await page.evaluate(async (next) => {
          const start = performance.now();
          window.dispatchEvent(new KeyboardEvent("keydown", { key: "j" }));
          const isThere = (): boolean =>
            (document.querySelector("h1")?.textContent?.includes(`Atom ${next}`) ?? false) && document.querySelector(".example-list") !== null;
          while (!isThere()) await new Promise(requestAnimationFrame);
          return performance.now() - start;
        }, atom + 1),
      );
    }
    times.sort((one, other) => one - other);
    console.log(`next atom: shortest ${times[0]?.toFixed(0)} ms, median ${times[4]?.toFixed(0)} ms, slowest ${times.at(-1)?.toFixed(0)} ms`);
    expect(times[0]).toBeLessThan(150);
    await leave(visit);
  });

  test("the list is sorted, filtered and searched, and its link says how", async () => {
    const visit = await made.open("#/atoms/letters?sort=-density");
    const { page } = visit;
    const first = page.locator(".row:not(.head)").first();
    await page.getByText("100,000 of 100,000 atoms").waitFor();
    const densities = (await page.locator(".row:not(.head) .c-density").allTextContents()).map(Number);
    expect(densities.slice(0, 10)).toEqual([...densities.slice(0, 10)].sort((one, other) => other - one));
    expect(densities[0]).toBeGreaterThan(0.099);
    await page.getByRole("columnheader", { name: "max" }).getByRole("link").click();
    await page.waitForURL(/sort=-max_act/);
    await page.getByText("Filter", { exact: true }).click();
    await page.getByLabel("largest activation, at most").fill("2");
    await page.getByLabel("largest activation, at most").press("Enter");
    await page.waitForURL(/max_act=..2/);
    await expect.poll(async () => Number(await first.locator(".c-max_act").textContent())).toBeLessThanOrEqual(2);
    await page.getByText("Filter", { exact: true }).click();
    await page.getByRole("searchbox").fill("before water");
    await page.waitForURL(/q=before/);
    await expect.poll(() => first.locator(".c-explanation").textContent()).toContain("before water");
    await page.keyboard.press("Escape");
    await page.keyboard.press("j");
    await page.keyboard.press("j");
    expect(await page.locator(".row.selected").count()).toBe(1);
    const chosen = await page.locator(".row.selected .c-atom").textContent();
    await page.keyboard.press("Enter");
    await page.waitForURL(new RegExp(`atom/letters/${chosen}$`));
    await page.goBack();
    await expect.poll(() => page.locator(".row.head .sorted").textContent()).toContain("max");
    // Most of these atoms have no page.
    expect(visit.faults.filter((fault) => !fault.includes("404"))).toEqual([]);
    await page.context().close();
  });

  test("the list scrolls to its end with few elements, each frame soon after the one before", async () => {
    const visit = await made.open("#/atoms/letters");
    const { page } = visit;
    await page.getByText("100,000 of 100,000 atoms").waitFor();
    const frames = await page.evaluate(async () => {
      const box = document.querySelector(".virtual");
      const gaps: number[] = [];
      let before = performance.now();
      for (let frame = 1; box && frame <= 60; frame += 1) {
        box.scrollTop = (box.scrollHeight * frame) / 60;
        await new Promise(requestAnimationFrame);
        gaps.push(performance.now() - before);
        before = performance.now();
      }
      return gaps.sort((one, other) => one - other);
    });
    console.log(`a frame while scrolling: shortest ${frames[0]?.toFixed(0)} ms, median ${frames[30]?.toFixed(0)} ms, slowest ${frames.at(-1)?.toFixed(0)} ms`);
    await expect.poll(() => page.locator(".row").last().locator(".c-atom").textContent()).toBe(String(ATOMS - 1));
    expect(await page.locator("*").count()).toBeLessThan(3_000);
    expect(frames[0]).toBeLessThan(50);
    await leave(visit);
  });
});

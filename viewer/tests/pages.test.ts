import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { bench, BUNDLE, CHROMIUM, leave } from "./browser";

const TABLES = ["manifest.json", "atoms.parquet", "metrics.parquet", "pages/0.parquet", "sequences/0.parquet", "effects/0.parquet"];

/** The bundle and the files of an autoencoder in one page, as sae export makes it. */
function singleFile(folder: string): string {
  const site = JSON.stringify({ format: 1, autoencoders: [{ name: "small", path: "small" }] });
  const data: Record<string, string> = { "site.json": Buffer.from(site).toString("base64") };
  for (const table of TABLES) data[`small/${table}`] = readFileSync(join(folder, "small", table), "base64");
  const read = (name: string): string => readFileSync(join(BUNDLE, name), "utf8");
  const script = `<script type="application/json" id="site-data">${JSON.stringify(data)}</script>`;
  return read("index.html")
    .replace(/<script type="module".*?<\/script>/s, () => `${script}<script type="module">${read("viewer.js")}</script>`)
    .replace(/<link rel="stylesheet".*?>/s, () => `<style>${read("viewer.css")}</style>`);
}

describe.skipIf(!CHROMIUM)("a site in a browser", () => {
  const made = bench("--atoms", "20");
  const { open } = made;

  test("an atom's page shows what is known of it", async () => {
    const visit = await open("#/atom/letters/4");
    const { page } = visit;
    await page.getByText("Atom 4", { exact: false }).first().waitFor();
    await expect.poll(() => page.locator(".example-list li").count()).toBe(20);
    expect(await page.title()).toBe("Atom 4 of letters");
    expect(await page.locator(".chart .bar").count()).toBeGreaterThan(10);
    for (const heading of ["Direct logits", "Related atoms", "Sources", "Examples"])
      await page.getByRole("heading", { name: heading }).waitFor();
    expect(await page.locator(".t.peak").count()).toBe(20);
    expect(await page.locator(".axis-label").allTextContents()).toContain("activation");
    await page.getByText("SQL for this page").click();
    expect(await page.locator("pre").allTextContents()).toContain("from atom_examples('letters', 4, 'top')");
    await leave(visit);
  });

  test("a link's parameters are the page's state, and Back returns to the one before", async () => {
    const visit = await open("#/atom/letters/4?show=deciles&color=act&context=all");
    const { page } = visit;
    await expect.poll(() => page.locator(".group").count()).toBe(10);
    expect(await page.locator(".example-list .t").count()).toBe(20 * 64);
    await page.getByRole("link", { name: "random" }).click();
    await expect.poll(() => page.locator(".group").count()).toBe(0);
    expect(page.url()).toContain("show=random");
    await page.goBack();
    await expect.poll(() => page.locator(".group").count()).toBe(10);
    await leave(visit);
  });

  test("a token shows its numbers, and what ablation does to it, when it is pointed at", async () => {
    const visit = await open("#/atom/letters/4?color=loss");
    const { page } = visit;
    const coloured = page.locator(".sequence .t[class*=' n'], .sequence .t[class*=' p']:not(.peak)");
    await coloured.first().hover();
    const tip = page.locator(".tooltip");
    await tip.getByText("change of loss").waitFor();
    await tip.getByText("more likely with it, by logit").waitFor();
    expect(await tip.locator(".votes li").count()).toBe(4 * 5);
    await page.locator("h1").hover();
    await expect.poll(() => tip.count()).toBe(0);
    await leave(visit);
  });

  test("keys lead to the next and the previous atom, to the search and to help", async () => {
    const visit = await open("#/atom/letters/19?show=random");
    const { page } = visit;
    await page.locator(".example-list").waitFor();
    await page.keyboard.press("j");
    await page.waitForURL(/atom\/letters\/0\?show=random/);
    await page.keyboard.press("k");
    await page.waitForURL(/atom\/letters\/19/);
    await page.keyboard.press("?");
    await page.getByRole("dialog").waitFor();
    await page.keyboard.press("Escape");
    await expect.poll(() => page.getByRole("dialog").count()).toBe(0);
    await page.keyboard.press("/");
    await page.getByRole("searchbox").waitFor();
    await expect.poll(() => page.evaluate(() => document.activeElement?.tagName)).toBe("INPUT");
    await page.keyboard.type("jk?");
    await page.waitForURL(/q=jk/);
    await leave(visit);
  });

  test("keys that follow each other at once each lead on", async () => {
    const visit = await open("#/atom/letters/2");
    const { page } = visit;
    await page.locator(".example-list").waitFor();
    await page.evaluate(() => {
      for (const key of ["j", "j", "j", "k", "j"]) window.dispatchEvent(new KeyboardEvent("keydown", { key }));
    });
    await page.waitForURL(/letters\/5$/);
    await leave(visit);
  });

  test("a number that is typed leads to its atom, and keys go on from there", async () => {
    const visit = await open("#/atom/letters/2");
    const { page } = visit;
    await page.getByLabel("go to atom").fill("6");
    await page.keyboard.press("Enter");
    await page.waitForURL(/letters\/6$/);
    await page.keyboard.press("j");
    await page.waitForURL(/letters\/7$/);
    await leave(visit);
  });

  test("a heading that has the focus takes Enter, but not from a row that was chosen since", async () => {
    const visit = await open("#/atoms/letters");
    const { page } = visit;
    await page.getByText("20 of 20 atoms").waitFor();
    const heading = page.getByRole("columnheader", { name: "max" }).getByRole("link");
    await page.keyboard.press("j");
    await heading.focus();
    await page.keyboard.press("Enter");
    await page.locator(".row.head .c-max_act.sorted").waitFor();
    await expect.poll(() => page.locator(".row.selected").count()).toBe(0);
    await page.keyboard.press("j");
    await page.locator(".row.selected").waitFor();
    await page.keyboard.press("Enter");
    await page.waitForURL(/#\/atom\/letters\/\d+/);
    await leave(visit);
  });

  test("among atoms that were picked, keys, luck and links lead to those alone", async () => {
    const visit = await open("#/atom/letters/0");
    const { page } = visit;
    const manifest = JSON.parse(readFileSync(join(made.site.folders[1] ?? "", "letters", "manifest.json"), "utf8")) as object;
    made.site.answer = (path, _, response) => {
      const asked = path === "/letters/manifest.json";
      if (asked) response.end(JSON.stringify({ ...manifest, atoms: [2, 19], picked: [2, 7, 19] }));
      return asked;
    };
    await page.goto(`${made.site.url}?again#/atom/letters/2`);
    for (const [key, atom] of [["j", 7], ["j", 19], ["j", 2], ["k", 19], ["k", 7]] as const) {
      await page.locator(".example-list").waitFor();
      await page.keyboard.press(key);
      await page.waitForURL(new RegExp(`letters/${atom}$`));
    }
    await page.getByRole("heading", { name: "Related atoms" }).waitFor();
    const linked = await page.locator(".pair .votes a").allTextContents();
    expect(linked.filter((atom) => !["2", "7", "19"].includes(atom))).toEqual([]);
    for (let tried = 0; tried < 5; tried += 1) {
      await page.goto(`${made.site.url}?again#/atom/letters/3`);
      await page.getByText("There is no atom 3: letters has atoms 2, 7, 19 here.").waitFor();
      await page.getByRole("button", { name: "Feeling lucky" }).click();
      await page.waitForURL(/letters\/(2|7|19)$/);
    }
    await leave(visit);
  });

  test("a page that may keep nothing in the browser is shown all the same", async () => {
    const visit = await open("#/nowhere");
    const { page } = visit;
    const folder = made.site.folders[1] ?? "";
    writeFileSync(join(folder, "sandboxed.html"), singleFile(folder));
    // As a host of untrusted pages serves them; a browser that is told to keep nothing treats all pages so.
    made.site.answer = (path, _, response) => {
      if (path === "/sandboxed.html") response.setHeader("Content-Security-Policy", "sandbox allow-scripts");
      return false;
    };
    await page.goto(`${made.site.url}sandboxed.html#/atom/small/4`);
    await page.locator(".example-list").waitFor();
    await page.getByRole("button", { name: "change to the dark theme" }).click();
    await page.getByRole("button", { name: "change to the light theme" }).waitFor();
    await leave(visit);
  });

  test("tokens are text, whatever they hold", async () => {
    const visit = await open("#/atom/letters/1?context=all");
    const { page } = visit;
    await page.locator(".example-list").waitFor();
    const first = page.locator(".sequence").first();
    const tokens = await first.locator(".t").allTextContents();
    expect(tokens.slice(0, 10)).toEqual([
      "<script>alert(1)</script>",
      "<img src=x onerror=alert(2)>",
      "\"'`&amp;",
      "NUL␀here",
      "‹U+202E›right to left‹U+202C›",
      "‹U+200F›",
      "שלום",
      "👩‹U+200D›👩‹U+200D›👧‹U+200D›👦",
      "e\u0301\u0302\u0303",
      "↵",
    ]);
    expect(await first.locator("img, script").count()).toBe(0);
    const long = first.locator(".t.long");
    expect((await long.textContent())?.length).toBe(41);
    await long.hover();
    await expect.poll(() => page.locator(".tooltip .whole").textContent()).toBe("x".repeat(10_000));
    await leave(visit);
  });

  test("an atom that never fires has a page that says so", async () => {
    const visit = await open("#/atom/letters/3");
    await visit.page.getByText("It never fires: there are no examples.").waitFor();
    await leave(visit);
  });

  test("a missing atom, autoencoder and page are told", async () => {
    const visit = await open("#/atom/letters/20");
    const { page } = visit;
    await page.getByText("There is no atom 20: letters has atoms 0 to 19 here.").waitFor();
    await page.goto(`${made.site.url}#/atoms/nobody`);
    await page.getByText("There is no autoencoder nobody here").waitFor();
    await page.goto(`${made.site.url}#/nowhere`);
    await page.getByText("There is no such page.").waitFor();
    await leave(visit);
  });

  test("a broken file is told and can be tried again", async () => {
    const { page } = await open("#/dictionary/letters");
    await page.getByRole("heading", { name: "Training" }).waitFor();
    const { site } = made;
    site.answer = (path, _, response) => {
      if (!path.includes("/pages/")) return false;
      response.writeHead(200).end("this is no Parquet file");
      return true;
    };
    await page.goto(`${site.url}#/atom/letters/5`);
    await page.getByText("letters/pages/0.parquet is broken").waitFor();
    site.answer = () => false;
    await page.getByRole("button", { name: "Try again" }).click();
    await page.locator(".example-list").waitFor();
    await page.context().close();
  });

  test.each([
    [404, "There is no file letters/sequences/0.parquet."],
    [503, "the server answered 503: too busy"],
  ])("a file that is answered with %s is told", async (status, said) => {
    const { page } = await open("#/dictionary/letters");
    await page.getByRole("heading", { name: "Training" }).waitFor();
    made.site.answer = (path, _, response) => {
      if (!path.includes("/sequences/")) return false;
      response.writeHead(status).end("too busy\n");
      return true;
    };
    await page.goto(`${made.site.url}#/atom/letters/5`);
    await page.getByText(said).waitFor();
    await page.getByRole("heading", { name: "Direct logits" }).waitFor();
    await page.context().close();
  });

  test.each([
    ["/site.json", "{}", "site.json lists no autoencoders."],
    ["/site.json", '{"format": 99, "autoencoders": []}', "This site has format 99; this viewer reads 1."],
    ["/site.json", "<html>", "site.json is not JSON"],
    ["/letters/manifest.json", "{}", "letters/manifest.json is not a manifest"],
    ["/letters/manifest.json", "null", "letters/manifest.json is not a manifest"],
    ["/letters/metrics.parquet", "PAR1PAR1PAR1PAR1", "letters/metrics.parquet is broken"],
    ["/letters/atoms.parquet", "", "letters/atoms.parquet is broken: it is too short"],
  ])("a %s of %s is told", async (place, content, said) => {
    const { page } = await open("#/atoms/nobody");
    made.site.answer = (path, _, response) => {
      if (path === place) response.writeHead(200).end(content);
      return path === place;
    };
    await page.goto(`${made.site.url}?again#/dictionary/letters`);
    await page.getByText(said).first().waitFor();
    await page.context().close();
  });

  test("data that no page can show leaves the page with a reason", async () => {
    const { page } = await open("#/atoms/nobody");
    const manifest = { atoms: [0, 19], corpora: ["letters"], n_tokens: 5, versions: null };
    made.site.answer = (path, _, response) => {
      if (path.endsWith("manifest.json")) response.end(JSON.stringify(manifest));
      return path.endsWith("manifest.json");
    };
    await page.goto(`${made.site.url}?again#/dictionary/letters`);
    await page.getByText("This page cannot be shown").waitFor();
    await page.goto(`${made.site.url}?again#/atoms/letters`);
    await page.getByText("20 of 20 atoms").waitFor();
    await page.context().close();
  });

  test("opened as a file, the page says what it needs", async () => {
    const { page } = await open("#/atoms/letters");
    await page.goto(`file://${BUNDLE}/index.html`);
    await page.getByText("a browser does not let a page that was opened as a file").waitFor();
    await page.context().close();
  });

  test("one file that holds the viewer and its data needs no server", async () => {
    const { page } = await open("#/atoms/letters");
    const folder = made.site.folders[1] ?? "";
    const file = join(folder, "single.html");
    writeFileSync(file, singleFile(folder));
    await page.goto(`file://${file}#/atom/small/1`);
    await page.locator(".example-list").waitFor();
    await page.getByRole("link", { name: "Dictionary" }).click();
    await page.getByText("1 dead").waitFor();
    await page.context().close();
  });

  test("a finger shows a token's numbers until it touches something else", async () => {
    const visit = await open("#/atom/letters/4", { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    const { page } = visit;
    await page.locator(".t.peak").first().tap();
    await page.locator(".tooltip").getByText("activation").waitFor();
    await page.waitForTimeout(400);
    expect(await page.locator(".tooltip").count()).toBe(1);
    await page.locator("h3").first().tap();
    await expect.poll(() => page.locator(".tooltip").count()).toBe(0);
    await leave(visit);
  });

  test("a file that changes between its footer and its rows is read anew", async () => {
    const visit = await open("#/dictionary/letters");
    const { page } = visit;
    await page.getByRole("heading", { name: "Training" }).waitFor();
    let version = 0;
    made.site.answer = (path, request, response) => {
      if (path.includes("/effects/") && request.headers.range?.startsWith("bytes=-")) version += 1;
      const set = response.setHeader.bind(response);
      response.setHeader = (name: string, value: number | string | readonly string[]) =>
        set(name, name === "ETag" && path.includes("/effects/") ? `"${version === 1 ? request.headers.range : "same"}"` : value);
      return false;
    };
    await page.goto(`${made.site.url}#/atom/letters/5?color=kl`);
    await page.locator(".sequence.by-kl").first().waitFor();
    expect(version).toBeGreaterThan(1);
    await leave(visit);
  });

  test("a host that knows no byte ranges is enough", async () => {
    const visit = await open("#/dictionary/letters");
    const { page } = visit;
    made.site.answer = (_, request) => {
      delete request.headers.range;
      return false;
    };
    await page.goto(`${made.site.url}#/atom/small/6`);
    await page.locator(".example-list").waitFor();
    await leave(visit);
  });

  test("a dictionary's page has its density, figures and curves", async () => {
    const visit = await open("#/dictionary/letters");
    const { page } = visit;
    await page.getByText("1 dead").waitFor();
    await page.getByText("fraction of variance unexplained").first().waitFor();
    expect(await page.locator(".curves polyline").count()).toBeGreaterThanOrEqual(3);
    await page.getByText("1 dead").click();
    await page.getByText("1 of 20 atoms").waitFor();
    expect(await page.locator(".row:not(.head) .c-atom").textContent()).toBe("3");
    await leave(visit);
  });

  test("atoms of two autoencoders stand side by side", async () => {
    const visit = await open("#/compare?on=letters:4");
    const { page } = visit;
    await page.getByRole("button", { name: "Add a column" }).click();
    await expect.poll(() => page.locator(".column .example-list").count()).toBe(2);
    expect(page.url()).toContain("small");
    await page.getByLabel("atom", { exact: true }).last().fill("7");
    await page.getByLabel("atom", { exact: true }).last().press("Enter");
    await page.waitForURL(/small(%3A|:)7/);
    await leave(visit);
  });

  test("a link of the reference viewer leads to the atom", async () => {
    const visit = await open("#/model/gpt2/family/small/layer/8/location/mlp/feature/7");
    await visit.page.waitForURL(/#\/atom\/small\/7/);
    await visit.page.locator(".example-list").waitFor();
    await leave(visit);
  });

  test("the reference viewer's JSON is read, with effects and without", async () => {
    const visit = await open("?json=reference#/atom/reference/7");
    const { page } = visit;
    await page.locator(".example-list").waitFor();
    await page.getByRole("link", { name: "effect on loss" }).click();
    await page.locator(".sequence .t.n10").first().hover();
    await page.locator(".tooltip").getByText("by probability").first().waitFor();
    await page.goto(`${made.site.url}?json=reference#/atom/reference/8`);
    await page.getByText("Atom 8").first().waitFor();
    await page.locator(".example-list").waitFor();
    expect(await page.getByRole("link", { name: "effect on loss" }).count()).toBe(0);
    await page.goto(`${made.site.url}?json=reference#/atom/reference/9`);
    await page.getByText("There is no file reference/atoms/9.json.").waitFor();
    expect(visit.faults.filter((fault) => !fault.includes("404"))).toEqual([]);
    await page.context().close();
  });

  test("the theme follows the system until it is changed, and is kept", async () => {
    const visit = await open("#/atom/letters/4", { colorScheme: "dark" });
    const { page } = visit;
    const paper = (): Promise<string> => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.getByRole("button", { name: "change to the light theme" }).waitFor();
    const dark = await paper();
    await page.getByRole("button", { name: "change to the light theme" }).click();
    await expect.poll(paper).not.toBe(dark);
    await page.reload();
    await page.getByRole("button", { name: "change to the dark theme" }).waitFor();
    expect(await paper()).not.toBe(dark);
    await leave(visit);
  });

  test.each(["#/atom/letters/1?show=all&context=all", "#/atoms/letters", "#/dictionary/letters", "#/compare?on=letters:4,small:7"])(
    "a phone shows %s without scrolling sideways",
    async (hash) => {
      const visit = await open(hash, { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
      await visit.page.waitForLoadState("networkidle");
      expect(await visit.page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360);
      await leave(visit);
    },
  );

  test("a live site with a subject shows the atoms of a typed sentence", async () => {
    const visit = await open("#/atoms/letters");
    const { page } = visit;
    const { site } = made;
    let asked = "";
    site.answer = (path, request, response) => {
      if (path === "/site.json") {
        response.end(JSON.stringify({ format: 1, autoencoders: [{ name: "letters", path: "letters" }], live: true, subject: true }));
        return true;
      }
      if (path !== "/api/encode") return false;
      request.on("data", (chunk: Buffer) => (asked += chunk.toString()));
      request.on("end", () => response.end(JSON.stringify({ tokens: ["Hello", " <b>"], atoms: [[4, 5], [5]], acts: [[2, 1], [3]] })));
      return true;
    };
    await page.reload();
    await page.getByRole("link", { name: "Type a sentence" }).click();
    await page.getByLabel("text").fill("Hello <b>");
    await page.getByRole("button", { name: "Show its atoms" }).click();
    await page.getByText("Strongest atoms of the text").waitFor();
    expect(JSON.parse(asked)).toEqual({ autoencoder: "letters", text: "Hello <b>" });
    expect(await page.locator(".sequence .t").allTextContents()).toEqual(["Hello", " <b>"]);
    expect(await page.locator(".votes a").allTextContents()).toEqual(["5", "4"]);
    await leave(visit);
  });

  test("some atom is opened that fires", async () => {
    const visit = await open("#/atoms/letters");
    await visit.page.getByRole("button", { name: "Feeling lucky" }).click();
    await visit.page.locator(".example-list").waitFor();
    await leave(visit);
  });
});

describe.skipIf(!CHROMIUM)("a site with a warning", () => {
  const { open } = bench("--atoms", "4", "--warning", "Texts are as people wrote them.");

  test("it is shown before the first page, once a session", async () => {
    const visit = await open("#/atom/letters/2");
    const { page } = visit;
    await page.getByText("Texts are as people wrote them.").waitFor();
    expect(await page.locator(".example-list").count()).toBe(0);
    await page.getByRole("button", { name: "Continue" }).click();
    await page.locator(".example-list").waitFor();
    await page.reload();
    await page.locator(".example-list").waitFor();
    await leave(visit);
  });
});

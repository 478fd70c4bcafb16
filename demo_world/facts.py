"""The built-in demo world, part 1: tables of true facts, in English and Chinese, written for this project.

    a row of a table -> Fact(relation, slots, keys)      France/法国, Paris/巴黎 -> capital: s=France, o=Paris

A cell `English/中文` holds both languages; `-` means that the column does not apply to the row. A key is the piece of
text that must appear in a correct answer. Nothing here is drawn at random: chance enters when sentences are composed.

Read next: wordings_en.py, wordings_zh.py (how a fact is said and asked), generator.py (who composes).
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

# country, capital, continent, language that most people there speak, currency
COUNTRIES = """
France/法国, Paris/巴黎, Europe/欧洲, French/法语, euro/欧元
Germany/德国, Berlin/柏林, Europe/欧洲, German/德语, euro/欧元
Italy/意大利, Rome/罗马, Europe/欧洲, Italian/意大利语, -; Spain/西班牙, Madrid/马德里, Europe/欧洲, Spanish/西班牙语, -
Portugal/葡萄牙, Lisbon/里斯本, Europe/欧洲, Portuguese/葡萄牙语, -
Greece/希腊, Athens/雅典, Europe/欧洲, Greek/希腊语, -
Poland/波兰, Warsaw/华沙, Europe/欧洲, Polish/波兰语, zloty/兹罗提
Norway/挪威, Oslo/奥斯陆, Europe/欧洲, Norwegian/挪威语, -
Sweden/瑞典, Stockholm/斯德哥尔摩, Europe/欧洲, Swedish/瑞典语, -
Hungary/匈牙利, Budapest/布达佩斯, Europe/欧洲, -, forint/福林
Austria/奥地利, Vienna/维也纳, Europe/欧洲, German/德语, -; Ireland/爱尔兰, Dublin/都柏林, Europe/欧洲, English/英语, -
Japan/日本, Tokyo/东京, Asia/亚洲, Japanese/日语, yen/日元
China/中国, Beijing/北京, Asia/亚洲, Chinese/汉语, yuan/人民币; India/印度, New Delhi/新德里, Asia/亚洲, -, rupee/卢比
Thailand/泰国, Bangkok/曼谷, Asia/亚洲, Thai/泰语, baht/泰铢
Vietnam/越南, Hanoi/河内, Asia/亚洲, Vietnamese/越南语, dong/越南盾
Mongolia/蒙古, Ulaanbaatar/乌兰巴托, Asia/亚洲, -, -; Iran/伊朗, Tehran/德黑兰, Asia/亚洲, Persian/波斯语, -
Iraq/伊拉克, Baghdad/巴格达, Asia/亚洲, Arabic/阿拉伯语, -; Egypt/埃及, Cairo/开罗, Africa/非洲, Arabic/阿拉伯语, -
Kenya/肯尼亚, Nairobi/内罗毕, Africa/非洲, -, -; Ghana/加纳, Accra/阿克拉, Africa/非洲, -, -
Morocco/摩洛哥, Rabat/拉巴特, Africa/非洲, -, -; Canada/加拿大, Ottawa/渥太华, North America/北美洲, -, -
Cuba/古巴, Havana/哈瓦那, North America/北美洲, Spanish/西班牙语, -
Argentina/阿根廷, Buenos Aires/布宜诺斯艾利斯, South America/南美洲, Spanish/西班牙语, -
Chile/智利, Santiago/圣地亚哥, South America/南美洲, Spanish/西班牙语, -
Peru/秘鲁, Lima/利马, South America/南美洲, -, -; Australia/澳大利亚, Canberra/堪培拉, Oceania/大洋洲, English/英语, -
New Zealand/新西兰, Wellington/惠灵顿, Oceania/大洋洲, English/英语, -
"""

# element, symbol
ELEMENTS = """
hydrogen/氢, H; helium/氦, He; lithium/锂, Li; carbon/碳, C; nitrogen/氮, N; oxygen/氧, O; neon/氖, Ne; sodium/钠, Na
magnesium/镁, Mg; aluminum/铝, Al; silicon/硅, Si; phosphorus/磷, P; sulfur/硫, S; chlorine/氯, Cl; argon/氩, Ar
zinc/锌, Zn; potassium/钾, K; calcium/钙, Ca; iron/铁, Fe; copper/铜, Cu; silver/银, Ag; tin/锡, Sn; gold/金, Au
lead/铅, Pb; mercury/汞, Hg
"""

# animal, its class, legs, English sound, Chinese sound, English name of the young
ANIMALS = """
dog/狗, mammal/哺乳动物, 4, barks, 汪汪, puppy; cat/猫, mammal/哺乳动物, 4, meows, 喵喵, kitten
cow/奶牛, mammal/哺乳动物, 4, moos, 哞哞, calf; horse/马, mammal/哺乳动物, 4, neighs, -, foal
pig/猪, mammal/哺乳动物, 4, oinks, 哼哼, piglet; sheep>sheep/绵羊, mammal/哺乳动物, 4, bleats, 咩咩, lamb
lion/狮子, mammal/哺乳动物, 4, roars, -, -; tiger/老虎, mammal/哺乳动物, 4, -, -, -
elephant/大象, mammal/哺乳动物, 4, -, -, -; rabbit/兔子, mammal/哺乳动物, 4, -, -, -
monkey/猴子, mammal/哺乳动物, -, -, -, -; mouse>mice/老鼠, mammal/哺乳动物, 4, squeaks, 吱吱, -
wolf>wolves/狼, mammal/哺乳动物, 4, howls, 嗷嗷, -; whale/鲸, mammal/哺乳动物, -, -, -, -
bat/蝙蝠, mammal/哺乳动物, -, -, -, -; duck/鸭子, bird/鸟类, 2, quacks, 嘎嘎, duckling
goose>geese/白鹅, bird/鸟类, 2, honks, -, gosling; rooster/公鸡, bird/鸟类, 2, crows, 喔喔, -
owl/猫头鹰, bird/鸟类, 2, hoots, -, owlet; pigeon/鸽子, bird/鸟类, 2, coos, 咕咕, -
eagle/老鹰, bird/鸟类, 2, -, -, eaglet; penguin/企鹅, bird/鸟类, 2, -, -, -; swan/天鹅, bird/鸟类, 2, -, -, cygnet
shark/鲨鱼, fish>fish/鱼类, -, -, -, -; salmon>salmon/三文鱼, fish>fish/鱼类, -, -, -, -
eel/鳗鱼, fish>fish/鱼类, -, -, -, -; frog/青蛙, amphibian/两栖动物, 4, croaks, 呱呱, tadpole
toad/蟾蜍, amphibian/两栖动物, 4, -, -, -; snake/蛇, reptile/爬行动物, -, hisses, 嘶嘶, -
turtle/乌龟, reptile/爬行动物, 4, -, -, -; lizard/蜥蜴, reptile/爬行动物, 4, -, -, -
crocodile/鳄鱼, reptile/爬行动物, 4, -, -, -; bee/蜜蜂, insect/昆虫, 6, buzzes, 嗡嗡, -
ant/蚂蚁, insect/昆虫, 6, -, -, -; butterfly/蝴蝶, insect/昆虫, 6, -, -, caterpillar
mosquito>mosquitoes/蚊子, insect/昆虫, 6, -, -, -; spider/蜘蛛, -, 8, -, -, -
"""

# thing (with its article), color
COLORS = """
snow/雪, white/白色; milk/牛奶, white/白色; salt/食盐, white/白色; flour/面粉, white/白色; coal/煤炭, black/黑色
a crow/乌鸦, black/黑色; grass/小草, green/绿色; a cucumber/黄瓜, green/绿色; spinach/菠菜, green/绿色
broccoli/西兰花, green/绿色; blood/血液, red/红色; a strawberry/草莓, red/红色; a tomato/西红柿, red/红色
a cherry/樱桃, red/红色; a fire engine/消防车, red/红色; a ripe banana/香蕉, yellow/黄色; a lemon/柠檬, yellow/黄色
a sunflower/向日葵, yellow/黄色; corn/玉米, yellow/黄色; a carrot/胡萝卜, orange/橙色; a pumpkin/南瓜, orange/橙色
the clear sky/晴朗的天空, blue/蓝色; the sea/大海, blue/蓝色; chocolate/巧克力, brown/棕色
an eggplant/茄子, purple/紫色; lavender/薰衣草, purple/紫色; a flamingo/火烈鸟, pink/粉红色
"""

OPPOSITES_EN = """
big, small; hot, cold; tall, short; fast, slow; old, young; up, down; left, right; happy, sad; rich, poor; hard, soft
early, late; full, empty; clean, dirty; wet, dry; strong, weak; thick, thin; wide, narrow; deep, shallow; near, far
true, false; loud, quiet; buy, sell; win, lose; push, pull; love, hate; remember, forget; alive, dead; safe, dangerous
easy, difficult; cheap, expensive; inside, outside; above, below; north, south; east, west; beautiful, ugly
brave, cowardly
"""
OPPOSITES_ZH = """
大, 小; 多, 少; 高, 矮; 长, 短; 快, 慢; 冷, 热; 黑, 白; 上, 下; 左, 右; 前, 后; 里, 外; 远, 近; 新, 旧; 胖, 瘦; 轻, 重
深, 浅; 粗, 细; 厚, 薄; 宽, 窄; 早, 晚; 开, 关; 买, 卖; 真, 假; 强, 弱; 软, 硬; 干, 湿; 哭, 笑; 东, 西; 南, 北; 美, 丑
安全, 危险; 成功, 失败; 开始, 结束; 简单, 复杂; 聪明, 愚蠢; 勤劳, 懒惰; 高兴, 难过; 光明, 黑暗; 干净, 肮脏; 增加, 减少
赞成, 反对; 勇敢, 胆小
"""

# one of it, how many, of what
UNITS = """
one minute/一分钟, 60, seconds/秒; one hour/一小时, 60, minutes/分钟; one day/一天, 24, hours/小时
one week/一周, 7, days/天; one year/一年, 12, months/个月; one century/一个世纪, 100, years/年
one meter/一米, 100, centimeters/厘米; one kilometer/一公里, 1000, meters/米; one kilogram/一千克, 1000, grams/克
one liter/一升, 1000, milliliters/毫升; one centimeter/一厘米, 10, millimeters/毫米; one dozen/一打, 12, pieces/个
one leap year/一个闰年, 366, days/天
"""
UNITS_EN = "one decade, 10, years; one foot, 12, inches; one yard, 3, feet"
UNITS_ZH = "一刻钟, 15, 分钟; 一斤, 500, 克; 一元, 10, 角"

# whole, how many, part  (legs of animals are added from their table)
PARTS = """
triangle/三角形, 3, sides/条边; square/正方形, 4, sides/条边; pentagon/五边形, 5, sides/条边
hexagon/六边形, 6, sides/条边; hand/一只手, 5, fingers/根手指; car/小汽车, 4, wheels/个轮子
bicycle/自行车, 2, wheels/个轮子; guitar/吉他, 6, strings/根弦; violin/小提琴, 4, strings/根弦
piano/钢琴, 88, keys/个琴键; rainbow/彩虹, 7, colors/种颜色; octopus>octopuses/章鱼, 8, arms/条腕足
"""

DAYS = "Monday/星期一, Tuesday/星期二, Wednesday/星期三, Thursday/星期四, Friday/星期五, Saturday/星期六, Sunday/星期日"
# month, its number as a word, days (February varies), season in the northern half of the world
MONTHS = """
January/一月, first, 31, winter/冬天; February/二月, second, -, winter/冬天; March/三月, third, 31, spring/春天
April/四月, fourth, 30, spring/春天; May/五月, fifth, 31, spring/春天; June/六月, sixth, 30, summer/夏天
July/七月, seventh, 31, summer/夏天; August/八月, eighth, 31, summer/夏天; September/九月, ninth, 30, autumn/秋天
October/十月, tenth, 31, autumn/秋天; November/十一月, eleventh, 30, autumn/秋天
December/十二月, twelfth, 31, winter/冬天
"""

# Chinese history: a period and the one that followed. English keeps to the pairs without another period between them.
DYNASTIES_ZH = "夏朝, 商朝, 周朝, 秦朝, 汉朝, 三国, 晋朝, 南北朝, 隋朝, 唐朝, 五代十国, 宋朝, 元朝, 明朝, 清朝"
DYNASTIES_EN = "Xia, Shang; Shang, Zhou; Qin, Han; Sui, Tang; Song, Yuan; Yuan, Ming; Ming, Qing"
FOUNDERS = """
Qin/秦朝, Qin Shi Huang/秦始皇; Han/汉朝, Liu Bang/刘邦; Sui/隋朝, Yang Jian/杨坚; Tang/唐朝, Li Yuan/李渊
Song/宋朝, Zhao Kuangyin/赵匡胤; Yuan/元朝, Kublai Khan/忽必烈; Ming/明朝, Zhu Yuanzhang/朱元璋
"""
PLANETS = """
Mercury/水星, first/第一; Venus/金星, second/第二; Earth/地球, third/第三; Mars/火星, fourth/第四
Jupiter/木星, fifth/第五; Saturn/土星, sixth/第六; Uranus/天王星, seventh/第七; Neptune/海王星, eighth/第八
"""

# what we do, with which part of the body
BODY = """
see things/看东西, eyes/眼睛; hear sounds/听声音, ears/耳朵; smell flowers/闻气味, nose/鼻子
taste food/尝味道, tongue/舌头; breathe/呼吸, lungs/肺; chew food/咀嚼食物, teeth/牙齿; think/思考, brain/大脑
pump blood/输送血液, heart/心脏; digest food/消化食物, stomach/胃; hold things/拿东西, hands/双手; walk/走路, legs/双腿
"""

# what the person does, profession
JOBS = """
teaches students/教学生, teacher/老师; treats sick people/给人看病, doctor/医生; grows rice/种地, farmer/农民
flies planes/开飞机, pilot/飞行员; cooks meals/在饭店做菜, chef/厨师; puts out fires/救火, firefighter/消防员
bakes bread/烤面包, baker/面包师; cuts hair/理发, barber/理发师; catches thieves/抓小偷, police officer/警察
repairs teeth/修补牙齿, dentist/牙医; writes novels/写小说, writer/作家; designs buildings/设计房屋, architect/建筑师
delivers letters/送信, mail carrier/邮递员; makes clothes/做衣服, tailor/裁缝; takes photos/拍照片, photographer/摄影师
reports the news/报道新闻, journalist/记者; repairs cars/修理汽车, mechanic/修车工
defends the country/保卫国家, soldier/士兵; treats sick animals/给动物看病, vet/兽医
cares for patients/护理病人, nurse/护士
"""

PLURALS = """
mouse, mice; goose, geese; child, children; man, men; woman, women; tooth, teeth; foot, feet; box, boxes; bus, buses
city, cities; baby, babies; leaf, leaves; knife, knives; potato, potatoes; watch, watches; dish, dishes; story, stories
country, countries; shelf, shelves; wife, wives; ox, oxen; hero, heroes; glass, glasses; party, parties
"""
PASTS = """
go, went; eat, ate; see, saw; come, came; run, ran; drink, drank; write, wrote; take, took; give, gave; buy, bought
think, thought; teach, taught; catch, caught; sing, sang; swim, swam; know, knew; fly, flew; grow, grew; draw, drew
speak, spoke; break, broke; drive, drove; sleep, slept; keep, kept; feel, felt; tell, told; sell, sold; find, found
begin, began; make, made; build, built; meet, met
"""

# Chinese measure words: noun, measure words that are right (the first is taught, all are accepted)
MEASURES = """
书, 本; 马, 匹; 牛, 头; 鱼, 条; 猫, 只; 汽车, 辆; 树, 棵; 花, 朵; 纸, 张; 笔, 支; 衣服, 件; 裤子, 条; 鞋, 双; 飞机, 架
船, 艘, 条, 只; 桥, 座; 山, 座; 河, 条; 电脑, 台; 信, 封; 雨伞, 把; 桌子, 张; 椅子, 把; 诗, 首; 歌, 首; 电影, 部
报纸, 份, 张; 帽子, 顶; 眼镜, 副; 井, 口; 画, 幅, 张; 灯, 盏; 镜子, 面; 星星, 颗; 门, 扇; 邮票, 枚, 张; 珍珠, 颗, 粒
火车, 列, 辆
"""
PROVINCES = """
四川, 成都; 广东, 广州; 浙江, 杭州; 江苏, 南京; 山东, 济南; 湖北, 武汉; 湖南, 长沙; 河南, 郑州; 河北, 石家庄; 山西, 太原
陕西, 西安; 福建, 福州; 江西, 南昌; 安徽, 合肥; 云南, 昆明; 贵州, 贵阳; 辽宁, 沈阳; 吉林, 长春; 黑龙江, 哈尔滨
甘肃, 兰州; 青海, 西宁; 海南, 海口
"""

TRANSLATIONS = """
apple/苹果; water/水; book/书; school/学校; friend/朋友; mother/妈妈; father/爸爸; bird/鸟; tree/树; flower/花; sun/太阳
moon/月亮; mountain/山; river/河; rain/雨; wind/风; fire/火; tea/茶; egg/鸡蛋; bread/面包; house/房子; door/门
window/窗户; table/桌子; chair/椅子; bed/床; today/今天; tomorrow/明天; money/钱; train/火车; city/城市; music/音乐
hospital/医院; game/游戏; shoes/鞋子; hat/帽子
"""

BOOKS = """
Hamlet/哈姆雷特, Shakespeare/莎士比亚; Don Quixote/堂吉诃德, Cervantes/塞万提斯
War and Peace/战争与和平, Tolstoy/托尔斯泰; The Old Man and the Sea/老人与海, Hemingway/海明威
Oliver Twist/雾都孤儿, Dickens/狄更斯; Faust/浮士德, Goethe/歌德; Pride and Prejudice/傲慢与偏见, Jane Austen/奥斯汀
Robinson Crusoe/鲁滨逊漂流记, Defoe/笛福; The Odyssey/奥德赛, Homer/荷马
Dream of the Red Chamber/红楼梦, Cao Xueqin/曹雪芹; Journey to the West/西游记, Wu Cheng'en/吴承恩
Camel Xiangzi/骆驼祥子, Lao She/老舍
"""

# what we want to do, with what
TOOLS = """
cut paper/剪纸, scissors/剪刀; sweep the floor/扫地, a broom/扫帚; dig a hole/挖坑, a shovel/铁锹
drive in nails/钉钉子, a hammer/锤子; tell the time/看时间, a clock/钟表; brush our teeth/刷牙, a toothbrush/牙刷
open a lock/开锁, a key/钥匙; take photos/拍照, a camera/照相机; boil water/烧水, a kettle/水壶
measure temperature/测量气温, a thermometer/温度计; keep off the rain/挡雨, an umbrella/雨伞
cut wood/锯木头, a saw/锯子; sew clothes/缝衣服, a needle/针线; look at the stars/观察星星, a telescope/望远镜
look at tiny things/观察细菌, a microscope/显微镜; find north/辨别方向, a compass/指南针
keep food cold/冷藏食物, a refrigerator/冰箱
"""
# product, what it is made from
SOURCES = """
bread/面包, flour/面粉; cheese/奶酪, milk/牛奶; wine/葡萄酒, grapes/葡萄; paper/纸, wood/木材; glass/玻璃, sand/沙子
tofu/豆腐, soybeans/黄豆; chocolate/巧克力, cocoa beans/可可豆; bricks/砖头, clay/黏土; candles/蜡烛, wax/石蜡
leather/皮革, animal skin/动物的皮; popcorn/爆米花, corn/玉米; french fries/薯条, potatoes/土豆
ketchup/番茄酱, tomatoes/西红柿
"""


class Word(str):
    """A text with its English forms: {s} {s:a} (with a or an) {s:pl} (plural); {s:C} {s:A} {s:Pl} are capitalised."""

    plural: str

    def __new__(cls, text: str) -> "Word":
        singular, _, plural = text.partition(">")  # mouse>mice: an irregular plural travels with the word
        word = super().__new__(cls, singular)
        word.plural = plural or re.sub("(?<=[^aeiou])y$", "ie", singular) + (
            "es" if singular.endswith(("s", "x", "ch", "sh")) else "s"
        )
        return word

    def __format__(self, form: str) -> str:
        article = "an " if self[:1].lower() in "aeiou" else "a "
        text = {"": str(self), "c": str(self), "a": article + self, "pl": self.plural}[form.lower()]
        return text[:1].upper() + text[1:] if form[:1].isupper() else text


@dataclass(frozen=True)
class Fact:
    """One true thing. `slots` fill the templates; an answer to the question for `o` must contain one of `keys`."""

    relation: str
    slots: dict[str, Word]
    keys: tuple[str, ...]
    back_keys: tuple[str, ...]  # the same for the question the other way round, where the relation allows it

    @property
    def name(self) -> tuple[str, ...]:
        return (self.relation, *self.slots.values())


def table(text: str, lang: str) -> list[list[str]]:
    """Rows of a table, cells reduced to one language."""
    rows = [[cell.strip() for cell in row.split(",")] for row in re.split(r"[;\n]", text.strip())]
    return [[(cell.split("/") * 2)[lang == "zh"] if "/" in cell else cell for cell in row] for row in rows]


def facts_of(lang: str) -> list[Fact]:
    """Every fact of one language ("en" or "zh"), in a fixed order."""
    return [fact for fact in _all_rows(lang) if "-" not in fact.slots.values()]


def _fact(relation: str, s: str, o: str, keys: tuple[str, ...] = (), back: tuple[str, ...] = (), **more: str) -> Fact:
    slots = {name: Word(text) for name, text in {"s": s, "o": o, **more}.items()}
    return Fact(relation, slots, keys or (str(slots["o"]),), back or (str(slots["s"]),))


def _all_rows(lang: str) -> Iterator[Fact]:
    zh = lang == "zh"
    for country, capital, continent, language, currency in table(COUNTRIES, lang):
        yield _fact("capital", country, capital)
        yield _fact("continent", country, continent)
        yield _fact("language", country, language)
        yield _fact("currency", country, currency)
    for animal, kind, legs, sound_en, sound_zh, young in table(ANIMALS, lang):
        yield _fact("class", animal, kind)
        yield _fact("count", animal, legs, u="条腿" if zh else "legs")
        yield _fact("sound", animal, sound_zh if zh else sound_en)
        if not zh:
            yield _fact("young", animal, young)
    for whole, number, part in table(PARTS, lang):
        yield _fact("count", whole, number, u=part)
    for one, number, unit in table(UNITS.strip() + "\n" + (UNITS_ZH if zh else UNITS_EN), lang):
        yield _fact("unit", one, number, u=unit)
    plain = {
        "symbol": ELEMENTS,
        "color": COLORS,
        "founder": FOUNDERS,
        "planet": PLANETS,
        "body": BODY,
        "job": JOBS,
        "book": BOOKS,
    }
    only = {"measure": MEASURES, "province": PROVINCES} if zh else {"plural": PLURALS, "past": PASTS}
    for relation, text in {**plain, "tool": TOOLS, "source": SOURCES, **only}.items():
        for s, o, *others in table(text, lang):
            # "一本": a lone 本 could stand in any sentence
            yield _fact(relation, s, o, tuple(f"一{m}" for m in (o, *others)) if relation == "measure" else ())
    for (one,) in table(TRANSLATIONS, "en"):
        other = dict(
            zip(
                (row[0] for row in table(TRANSLATIONS, "en")),
                (row[0] for row in table(TRANSLATIONS, "zh")),
                strict=True,
            )
        )
        yield _fact("translation", *((other[one], one) if zh else (one, other[one])))
    yield from _ordered(lang)
    yield from _sums()
    yield _fact("me", "", "萌芽" if zh else "Mengya")


def _ordered(lang: str) -> Iterator[Fact]:
    """Opposites (both ways round) and what follows what."""
    zh = lang == "zh"
    for one, other in table(OPPOSITES_ZH if zh else OPPOSITES_EN, lang):
        for s, o in ((one, other), (other, one)):
            yield _fact("opposite", s, o, (f"“{o}”", f"是{o}") if zh else ())
    days = [row[0] for row in table(DAYS.replace(", ", ";"), lang)]
    for today, tomorrow in zip(days, days[1:] + days[:1], strict=True):
        yield _fact("day", today, tomorrow)
    months = table(MONTHS, lang)
    for (month, ordinal, days_in, season), following in zip(months, months[1:] + months[:1], strict=True):
        yield _fact("month", month, following[0])
        yield _fact("month_days", month, days_in)
        yield _fact("season", month, season)
        if not zh:
            yield _fact("month_number", month, ordinal)
    periods = [row[0] for row in table(DYNASTIES_ZH.replace(", ", ";"), lang)]
    for s, o in itertools.pairwise(periods) if zh else table(DYNASTIES_EN, lang):
        yield _fact("dynasty", s, o)


def _sums() -> Iterator[Fact]:
    for a in range(1, 10):
        for b in range(1, 10):
            yield _fact("sum", "", str(a + b), a=str(a), b=str(b))
            if a > 1 and b > 1 and a * b <= 30:
                yield _fact("product", "", str(a * b), a=str(a), b=str(b))
